"""From a checked request to a generation that can be read: an earlier one where there is one, else a new one."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum

from reprise.api import continuity
from reprise.api.continuity import Asked
from reprise.api.generation import Generation, LogReader, Submitted
from reprise.api.head import ResponseHead
from reprise.api.sampling import choose_seed, ignored_parameters
from reprise.api.service import Service, new_id
from reprise.errors import InvalidRequestError
from reprise.ipc.messages import Ready
from reprise.protocol.parameters import GenerationParameters
from reprise.protocol.responses import RepriseExtension
from reprise.settings import Settings
from reprise.types import GenerationRequest


class How(StrEnum):
    """How a request came to its generation."""

    BEGUN = "begun"
    JOINED = "joined"
    ATTACHED = "attached"
    RECOMPUTED = "recomputed"


@dataclass(frozen=True)
class Obtained:
    """A generation, and the reader of it that is this request's."""

    generation: Generation
    reader: LogReader
    how: How


@dataclass(frozen=True)
class Call:
    """One request, after everything was checked that can be without its tokens."""

    asked: Asked
    parameters: GenerationParameters
    id_prefix: str
    model: str
    num_choices: int
    """Of all prompts together."""
    digest: bytes
    num_body_bytes: int
    system_fingerprint: str
    info: Ready
    to_generation: Callable[[str, int], list[GenerationRequest]]
    """Tokenises: called in a thread, with the response's id and the seed."""


def check_retention(parameters: GenerationParameters, settings: Settings) -> None:
    """Raise InvalidRequestError where a request asks to be kept for longer than is allowed."""
    seconds, limit = parameters.retain_seconds, settings.max_retain_seconds
    if seconds is not None and seconds > limit:
        raise InvalidRequestError(
            f"Invalid 'retain_seconds': {seconds:g} is more than the {limit:g} seconds that this server keeps at most.",
            param="retain_seconds",
        )


async def obtain(service: Service, call: Call) -> Obtained:
    """What the request is to be answered with. Whoever calls this leaves the generation when through with it."""
    if call.asked.sent is not None:
        return await _resume(service, call)
    generations, key = service.generations, call.asked.slot
    if key is None:
        return await _begin(service, call, How.BEGUN)
    while (slot := generations.slot(key)) is not None:
        if slot.digest != call.digest:
            raise continuity.key_reused()
        generation = await slot.wait()
        if generation is not None and generations.slot(key) is slot:
            generations.num_joined += 1
            return Obtained(generation, generations.attach(generation), How.JOINED)
    return await _begin(service, call, How.BEGUN, key=key)


async def _resume(service: Service, call: Call) -> Obtained:
    """The rest of a stream, from its generation where that is held, else computed again."""
    sent, generations = call.asked.sent, service.generations
    if sent is None:
        raise ValueError("this request does not resume a stream")
    response_id = continuity.response_id(call.id_prefix, sent)
    generation = generations.find(sent, response_id, owner=call.asked.owner, digest=call.digest)
    if generation is not None:
        continuity.check_positions(sent, generation.submitted.requests)
        reader = generations.attach(generation, sent)
        generations.num_attached += 1
        return Obtained(generation, reader, How.ATTACHED)
    if not call.info.deterministic:
        raise continuity.cannot_resume(
            "its generation is no longer held, and this server does not promise the same answer twice"
        )
    key = call.asked.slot
    if key is not None and generations.slot(key) is not None:
        key = None
    obtained = await _begin(service, call, How.RECOMPUTED, key=key)
    generations.num_recomputed += 1
    return obtained


async def _begin(service: Service, call: Call, how: How, *, key: bytes | None = None) -> Obtained:
    """A new generation. key: of an idempotency slot that is free."""
    if key is None:
        return await _submit(service, call, how, None)
    slot = service.generations.take_slot(key, call.digest)
    try:
        obtained = await _submit(service, call, how, key)
    except BaseException:
        service.generations.give_up_slot(key)
        raise
    slot.decide(obtained.generation)
    return obtained


def _tokenised(call: Call, response_id: str, seed: int) -> tuple[list[GenerationRequest], bytes]:
    """What the engine is asked, and the digest of the prompts. Not for the event loop."""
    requests = call.to_generation(response_id, seed)
    return requests, continuity.prompt_digest(requests)


async def _submit(service: Service, call: Call, how: How, key: bytes | None) -> Obtained:
    """Tokenise and enqueue. This is where every generation begins."""
    parameters, sent = call.parameters, call.asked.sent
    if sent is None:
        response_id, seed, created = new_id(call.id_prefix), choose_seed(parameters), int(time.time())
    else:
        response_id = continuity.response_id(call.id_prefix, sent)
        seed, created = sent.origin.seed, sent.origin.created
    with ExitStack() as undo:
        ticket = service.admission.reserve(call.num_choices)
        undo.callback(ticket.release)
        requests, prompt_digest = await service.text_threads.run(_tokenised, call, response_id, seed)
        if sent is not None:
            continuity.check_prompts(sent, prompt_digest)
            continuity.check_positions(sent, requests)
        # A drain may have begun while the prompt was made.
        service.check_available()
        streams = []
        for request in requests:
            stream = service.engine.submit(request)
            undo.callback(stream.close)
            streams.append(stream)
        guesses = call.info.tier == "paged" and call.info.deterministic
        ignored = ignored_parameters(parameters, has_key=key is not None, guesses=guesses)
        head = ResponseHead(
            id=response_id,
            created=created,
            model=call.model,
            system_fingerprint=call.system_fingerprint,
            extension=RepriseExtension(seed, ignored, call.info.deterministic),
            num_prompt_tokens=tuple(len(request.prompt_token_ids) for request in requests),
            num_choices=parameters.n or 1,
        )
        generation, reader = service.generations.begin(
            Submitted(
                head=head,
                parameters=parameters,
                requests=requests,
                streams=streams,
                ticket=ticket,
                digest=call.digest,
                prompt_digest=prompt_digest,
                owner=call.asked.owner,
                idempotency_slot=key,
                retain_seconds=0.0 if "retain_seconds" in ignored else parameters.retain_seconds or 0.0,
                keep_seconds_after_end=service.settings.idempotency_seconds if key is not None else 0.0,
                num_body_bytes=call.num_body_bytes,
                recomputed=sent is not None,
            ),
            sent,
        )
        undo.pop_all()
    return Obtained(generation, reader, how)
