"""What a client says of an earlier request of its own: `Last-Event-ID` and `Idempotency-Key`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import msgspec
from pydantic import BaseModel
from starlette.requests import Request

from reprise.api import event_ids
from reprise.api.auth import key_digest
from reprise.api.errors import HttpError
from reprise.api.event_ids import EventId, Origin
from reprise.api.head import ResponseHead
from reprise.api.text_threads import TextThreads
from reprise.errors import InvalidRequestError
from reprise.protocol.parameters import GenerationParameters
from reprise.types import GenerationRequest

LAST_EVENT_ID = "Last-Event-ID"
IDEMPOTENCY_KEY = "Idempotency-Key"
CANNOT_RESUME = "cannot_resume"
_HOW_IT_IS_SENT = {"stream", "stream_options", "retain_seconds"}
"""Members that say how a response is sent, and nothing about what it is."""
_LARGE_BODY = 16 * 1024
_KEY = re.compile(r"[!-~]{1,255}")


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The headers of one request."""

    owner: bytes
    """A digest of its API key; empty where the server has no keys."""
    sent: EventId | None
    """Where the client stands in a stream that it had before."""
    slot: bytes | None
    """A digest of its idempotency key, of whose key it is and of the endpoint."""


def asked(request: Request, *, endpoint: str, has_keys: bool) -> Asked:
    """Raises InvalidRequestError where one of the headers is none."""
    owner = key_digest(request.scope) if has_keys else b""
    key = _single(request, IDEMPOTENCY_KEY)
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidRequestError(
            f"Invalid '{IDEMPOTENCY_KEY}': it must be 1 to 255 visible ASCII characters.", param=IDEMPOTENCY_KEY
        )
    slot = None if key is None else hashlib.sha256(b"\0".join((owner, endpoint.encode(), key.encode()))).digest()
    last = _single(request, LAST_EVENT_ID)
    try:
        sent = None if last is None else event_ids.parse(last)
    except event_ids.InvalidEventIdError as error:
        raise _invalid(str(error)) from None
    return Asked(owner=owner, sent=sent, slot=slot)


def _single(request: Request, name: str) -> str | None:
    values = request.headers.getlist(name)
    if len(values) > 1:
        raise InvalidRequestError(f"'{name}' was sent {len(values)} times; send it once.", param=name)
    return values[0] if values else None


async def request_digest(parameters: GenerationParameters, endpoint: str, size: int, threads: TextThreads) -> bytes:
    """32 bytes, equal for requests with equal responses. size: of the body; large ones are digested in a thread."""
    if size <= _LARGE_BODY:
        return digest(parameters, endpoint)
    return await threads.run(digest, parameters, endpoint)


def digest(parameters: BaseModel, endpoint: str) -> bytes:
    text = parameters.model_dump_json(exclude=_HOW_IT_IS_SENT, exclude_none=True)
    return hashlib.sha256(f"{endpoint}\0{text}".encode(errors="surrogatepass")).digest()


def prompt_digest(requests: Sequence[GenerationRequest]) -> bytes:
    """32 bytes, equal for equal tokens of all prompts. Not for the event loop."""
    found = hashlib.sha256()
    for request in requests:
        found.update(msgspec.json.encode(request.prompt_token_ids))
    return found.digest()


def origin(head: ResponseHead, request_digest: bytes, prompts: bytes) -> Origin:
    """What the ids of a response's events have in common. prompts: their `prompt_digest`."""
    return Origin(
        number=bytes.fromhex(head.id.rpartition("-")[2]),
        created=head.created,
        seed=head.extension.seed,
        fingerprint=_fingerprint_bytes(head.system_fingerprint),
        digest=request_digest[:8],
        prompts=prompts[:4],
    )


def response_id(prefix: str, sent: EventId) -> str:
    """Of the response that the event came from."""
    return f"{prefix}-{sent.origin.number.hex()}"


def check_belongs(sent: EventId, *, num_choices: int, digest: bytes, system_fingerprint: str, stream: bool) -> None:
    """Refuse to go on where the client stands.

    Raises InvalidRequestError where that is no place in this request's stream, HttpError 409 where this server would
    go on otherwise than the one that began.
    """
    if not stream:
        raise InvalidRequestError(f"'{LAST_EVENT_ID}' is only allowed with 'stream': true.", param=LAST_EVENT_ID)
    if sent.origin.fingerprint != _fingerprint_bytes(system_fingerprint):
        raise cannot_resume(
            "it was begun by another model, or by a server that computes otherwise: its system fingerprint"
            f" was fp_{sent.origin.fingerprint.hex()} and is {system_fingerprint} here"
        )
    if sent.origin.digest != digest[:8] or len(sent.positions) != num_choices:
        raise _invalid("it belongs to another request; send the very same body again")


def check_prompts(sent: EventId, prompts: bytes) -> None:
    """Raise HttpError 409 where the same request makes other prompts now. prompts: their `prompt_digest`.

    As with a chat template that asks for the date.
    """
    if sent.origin.prompts != prompts[:4]:
        raise cannot_resume(
            "the request's prompt has other tokens now than when it was begun, as where the model's chat template"
            " asks for the date"
        )


def check_positions(sent: EventId, requests: list[GenerationRequest]) -> None:
    """Raise InvalidRequestError where the client would have more than the request may generate."""
    limits = [request.sampling.max_tokens for request in requests for _ in range(request.num_choices)]
    for index, (position, limit) in enumerate(zip(sent.positions, limits, strict=True)):
        if position.num_tokens > limit:
            raise _invalid(f"it has {position.num_tokens} tokens of choice {index}, which has {limit} at most")


def cannot_resume(why: str) -> HttpError:
    """The refusal of a stream that would go on with something else."""
    message = f"This stream cannot be resumed: {why}. Send the request again without '{LAST_EVENT_ID}'"
    headers = {"x-should-retry": "false"}  # else OpenAI's clients ask again
    return HttpError(409, message, code=CANNOT_RESUME, param=LAST_EVENT_ID, headers=headers)


def key_reused() -> HttpError:
    """The refusal of another request under the same key."""
    message = f"This '{IDEMPOTENCY_KEY}' was used for another request a short while ago. Choose a new one"
    return HttpError(422, message, code="idempotency_key_reused", param=IDEMPOTENCY_KEY)


def _invalid(why: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid '{LAST_EVENT_ID}': {why}.", param=LAST_EVENT_ID)


def _fingerprint_bytes(system_fingerprint: str) -> bytes:
    return bytes.fromhex(system_fingerprint.removeprefix("fp_"))
