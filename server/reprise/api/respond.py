"""A generation's way through the server: admitted, made, submitted, then streamed or folded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from reprise.api import sse
from reprise.api.body import json_response, read_request
from reprise.api.errors import blame, to_reply
from reprise.api.head import ResponseHead
from reprise.api.metrics import GenerationTimes
from reprise.api.running import RunningRequest
from reprise.api.sampling import Served, choose_seed, ignored_parameters, mask_parameter
from reprise.api.service import Service, new_id
from reprise.errors import GenerationError
from reprise.protocol.parameters import GenerationParameters
from reprise.protocol.responses import ErrorResponse, RepriseExtension
from reprise.types import ChoiceDelta, GenerationRequest

Parameters = TypeVar("Parameters", bound=GenerationParameters)
Chunk = TypeVar("Chunk", bound=msgspec.Struct)
InParameters_contra = TypeVar("InParameters_contra", bound=GenerationParameters, contravariant=True)
InChunk_contra = TypeVar("InChunk_contra", bound=msgspec.Struct, contravariant=True)
OutChunk_co = TypeVar("OutChunk_co", bound=msgspec.Struct, covariant=True)
Result = TypeVar("Result")


class Chunks(Protocol[OutChunk_co]):
    """Deltas to chunks."""

    def push(self, delta: ChoiceDelta) -> Sequence[OutChunk_co]: ...
    def end(self) -> Sequence[OutChunk_co]: ...


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
    service.admission.check_room()
    parameters = await read_request(request, endpoint.request_model, service.text_threads)
    times = service.metrics.generation()
    model, served = service.model_name(parameters.model), service.served(info)
    ticket = service.admission.reserve(endpoint.check(parameters, served))
    cleanup.callback(ticket.release)

    response_id, seed = new_id(endpoint.id_prefix), choose_seed(parameters)
    generations = await service.text_threads.run(
        endpoint.to_generation, parameters, served, response_id=response_id, seed=seed
    )
    running = _submit(service, generations, cleanup)
    extension = RepriseExtension(seed, ignored_parameters(parameters))
    head = ResponseHead(
        id=response_id,
        created=int(time.time()),
        model=model,
        system_fingerprint=service.fingerprint(info, served),
        extension=extension,
        num_prompt_tokens=tuple(len(generation.prompt_token_ids) for generation in generations),
        num_choices=parameters.n or 1,
    )
    options = parameters.stream_options
    include_usage = not parameters.stream or bool(options is not None and options.include_usage)
    chunks = endpoint.to_chunks(head, parameters, generations, served, include_usage=include_usage)
    headers, mask = _headers(extension), mask_parameter(parameters)
    if parameters.stream:
        return sse.EventStream(
            _events(running, chunks, times, request_id=request.scope["state"]["request_id"], mask=mask),
            headers=headers,
            keep_alive_interval=service.settings.keep_alive_interval,
            send_timeout=service.settings.send_timeout,
        )
    try:
        full = await _unless_client_leaves(request, _fold(running, chunks, endpoint.fold(), times))
    except GenerationError as error:
        raise blame(error, mask=mask) from None
    return json_response(full, headers=headers)


def _submit(service: Service, generations: list[GenerationRequest], cleanup: ExitStack) -> RunningRequest:
    """Enqueue all generations, and have them ended with the request, whatever ends it."""
    # A drain may have begun while the prompt was made.
    service.check_available()
    streams = []
    for generation in generations:
        stream = service.engine.submit(generation)
        cleanup.callback(stream.close)
        streams.append(stream)
    running = RunningRequest(streams, num_choices=generations[0].num_choices, timeout=service.settings.request_timeout)
    service.add_running(running)
    cleanup.callback(service.remove_running, running)
    return running


def _headers(extension: RepriseExtension) -> dict[str, str]:
    headers = {"x-reprise-seed": str(extension.seed)}
    if extension.ignored_parameters:
        headers["x-reprise-ignored-parameters"] = ", ".join(extension.ignored_parameters)
    return headers


async def _events(
    running: RunningRequest, chunks: Chunks[Chunk], times: GenerationTimes, *, request_id: str, mask: str | None
) -> AsyncIterator[bytes]:
    """The events of a stream: its chunks, an error where there is one, and the end in any case."""
    try:
        async for delta in running:
            times.delta(delta)
            if events := b"".join(sse.encode(chunk) for chunk in chunks.push(delta)):
                yield events
        for chunk in chunks.end():
            yield sse.encode(chunk)
    except Exception as error:  # noqa: BLE001 - a stream has no other way to tell of an error
        yield sse.encode(ErrorResponse(to_reply(blame(error, mask=mask), request_id=request_id).error))
    finally:
        running.close()
    times.end()
    yield sse.DONE


async def _fold(
    running: RunningRequest, chunks: Chunks[Chunk], folding: Fold[Chunk], times: GenerationTimes
) -> msgspec.Struct:
    """The full response: the fold of the chunks that a stream would have."""
    async for delta in running:
        times.delta(delta)
        for chunk in chunks.push(delta):
            folding.push(chunk)
    for chunk in chunks.end():
        folding.push(chunk)
    times.end()
    return folding.result()


async def _unless_client_leaves(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
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
