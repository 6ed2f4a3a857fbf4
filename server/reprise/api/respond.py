"""A generation request's way through the server: read, checked, submitted (or found), then streamed or folded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from reprise.api import continuity, sse
from reprise.api.body import json_response, read_request
from reprise.api.chunks import Placed
from reprise.api.continuity import Asked
from reprise.api.errors import blame, to_reply
from reprise.api.event_ids import EventIdWriter
from reprise.api.event_writer import EventWriter
from reprise.api.head import ResponseHead
from reprise.api.metrics import GenerationTimes
from reprise.api.sampling import Served, mask_parameter
from reprise.api.service import Service
from reprise.api.submission import Call, How, Obtained, check_retention, obtain
from reprise.errors import GenerationError
from reprise.generation.request_stream import Reader
from reprise.ipc.messages import Ready
from reprise.protocol.parameters import GenerationParameters
from reprise.protocol.responses import Error, ErrorResponse
from reprise.types import ChoiceDelta, GenerationRequest

Parameters = TypeVar("Parameters", bound=GenerationParameters)
Chunk = TypeVar("Chunk", bound=msgspec.Struct)
InParameters_contra = TypeVar("InParameters_contra", bound=GenerationParameters, contravariant=True)
InChunk_contra = TypeVar("InChunk_contra", bound=msgspec.Struct, contravariant=True)
OutChunk_co = TypeVar("OutChunk_co", bound=msgspec.Struct, covariant=True)
Result = TypeVar("Result")


class Chunks(Protocol[OutChunk_co]):
    """Deltas to chunks."""

    def push(self, delta: ChoiceDelta) -> Sequence[Placed[OutChunk_co]]: ...
    def end(self) -> Sequence[Placed[OutChunk_co]]: ...
    def omit_extension(self) -> None: ...


class Fold(Protocol[InChunk_contra]):
    """Chunks to the full response."""

    def push(self, chunk: InChunk_contra) -> None: ...
    def result(self) -> msgspec.Struct: ...


class ToGeneration(Protocol[InParameters_contra]):
    def __call__(
        self, request: InParameters_contra, served: Served, *, response_id: str, seed: int
    ) -> list[GenerationRequest]: ...


class ToChunks(Protocol[InParameters_contra, OutChunk_co]):
    def __call__(
        self,
        head: ResponseHead,
        request: InParameters_contra,
        generations: list[GenerationRequest],
        served: Served,
        *,
        include_usage: bool,
    ) -> Chunks[OutChunk_co]: ...


@dataclass(frozen=True)
class Endpoint(Generic[Parameters, Chunk]):
    """What chat and completions do each in their own way."""

    id_prefix: str
    request_model: type[Parameters]
    check: Callable[[Parameters, Served], int]
    """Refuses what is wrong without rendering or tokenising; gives the number of choices in all."""
    to_generation: ToGeneration[Parameters]
    to_chunks: ToChunks[Parameters, Chunk]
    fold: Callable[[], Fold[Chunk]]


async def respond(request: Request, endpoint: Endpoint[Parameters, Chunk]) -> Response:
    """The answer to a generation request. All that can be refused is refused before a stream's 200."""
    service: Service = request.app.state.service
    cleanup: ExitStack = request.scope["state"]["cleanup"]
    info = service.check_available()
    asked = continuity.asked(request, endpoint=endpoint.id_prefix, has_keys=bool(service.settings.api_key))
    if not _is_held(service, endpoint, asked):
        service.admission.check_room()
    parameters = await read_request(request, endpoint.request_model, service.text_threads)
    times: GenerationTimes | None = service.metrics.generation()
    served = service.served(info)
    call = await _checked(request, service, endpoint, asked, parameters, served, info)
    obtained = await obtain(service, call)
    generation = obtained.generation
    cleanup.callback(service.generations.leave, generation, obtained.reader)
    if obtained.how not in (How.BEGUN, How.RECOMPUTED):
        times = None
    options = parameters.stream_options
    include_usage = not parameters.stream or bool(options is not None and options.include_usage)
    requests = generation.submitted.requests
    chunks = endpoint.to_chunks(generation.head, parameters, requests, served, include_usage=include_usage)
    if asked.sent is not None:
        chunks.omit_extension()
    headers, mask = _headers(obtained), mask_parameter(parameters)
    if parameters.stream:
        origin = continuity.origin(generation.head, call.digest, generation.submitted.prompt_digest)
        ids = EventIdWriter(origin, call.num_choices)
        return sse.EventStream(
            _events(
                obtained.reader,
                chunks,
                EventWriter(ids, asked.sent),
                times,
                leave=partial(service.generations.leave, generation, obtained.reader),
                to_error=lambda error: (
                    to_reply(blame(error, mask=mask), request_id=request.scope["state"]["request_id"]).error
                ),
            ),
            headers=headers,
            keep_alive_interval=service.settings.keep_alive_interval,
        )
    try:
        full = await unless_client_leaves(request, _fold(obtained.reader, chunks, endpoint.fold(), times))
    except GenerationError as error:
        raise blame(error, mask=mask) from None
    return json_response(full, headers=headers)


def _is_held(service: Service, endpoint: Endpoint[Parameters, Chunk], asked: Asked) -> bool:
    """Whether the request may be answered by what is there already, so that it needs no room."""
    if asked.sent is not None:
        response_id = continuity.response_id(endpoint.id_prefix, asked.sent)
        return service.generations.holds(response_id, owner=asked.owner)
    return asked.slot is not None and service.generations.slot(asked.slot) is not None


async def _checked(
    request: Request,
    service: Service,
    endpoint: Endpoint[Parameters, Chunk],
    asked: Asked,
    parameters: Parameters,
    served: Served,
    info: Ready,
) -> Call:
    """Refuse what can be refused without tokenising."""
    model, num_choices = service.model_name(parameters.model), endpoint.check(parameters, served)
    check_retention(parameters, service.settings)
    size, threads = len(await request.body()), service.text_threads
    digest = await continuity.request_digest(parameters, endpoint.id_prefix, size, threads)
    fingerprint = service.fingerprint(info)
    if asked.sent is not None:
        continuity.check_belongs(
            asked.sent,
            num_choices=num_choices,
            digest=digest,
            system_fingerprint=fingerprint,
            stream=bool(parameters.stream),
        )
    return Call(
        asked=asked,
        parameters=parameters,
        id_prefix=endpoint.id_prefix,
        model=model,
        num_choices=num_choices,
        digest=digest,
        num_body_bytes=size,
        system_fingerprint=fingerprint,
        info=info,
        to_generation=lambda response_id, seed: endpoint.to_generation(
            parameters, served, response_id=response_id, seed=seed
        ),
    )


def _headers(obtained: Obtained) -> dict[str, str]:
    extension = obtained.generation.head.extension
    headers = {"x-reprise-seed": str(extension.seed)}
    if extension.ignored_parameters:
        headers["x-reprise-ignored-parameters"] = ", ".join(extension.ignored_parameters)
    if obtained.how is How.JOINED:
        headers["idempotent-replayed"] = "true"
    return headers


async def _events(
    reader: Reader,
    chunks: Chunks[Chunk],
    writer: EventWriter,
    times: GenerationTimes | None,
    *,
    leave: Callable[[], None],
    to_error: Callable[[Exception], Error],
) -> AsyncIterator[bytes]:
    """The events of a stream: its chunks, an error where there is one, and the end in any case."""
    try:
        async for delta in reader:
            if times is not None:
                times.delta(delta)
            if events := writer.write(chunks.push(delta)):
                yield events
        if events := writer.write(chunks.end()):
            yield events
        if times is not None:
            times.end()
    except Exception as error:  # noqa: BLE001 - a stream has no other way to tell of an error
        yield sse.encode(ErrorResponse(to_error(error)))
    finally:
        leave()
    yield sse.DONE


async def _fold(
    reader: Reader, chunks: Chunks[Chunk], folding: Fold[Chunk], times: GenerationTimes | None
) -> msgspec.Struct:
    """The full response: the fold of the chunks that a stream would have."""
    async for delta in reader:
        if times is not None:
            times.delta(delta)
        for placed in chunks.push(delta):
            folding.push(placed.chunk)
    for placed in chunks.end():
        folding.push(placed.chunk)
    if times is not None:
        times.end()
    return folding.result()


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result. Raises ClientDisconnect as soon as the client is gone; nothing else would tell."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
