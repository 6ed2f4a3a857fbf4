"""The generations that one API request runs, as one stream of deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import msgspec

from reprise.errors import GenerationError
from reprise.generation.interface import GenerationStream
from reprise.types import ChoiceDelta


class RunningRequest:
    """Deltas of all prompts with choice indices `prompt_index * num_choices + j`, until all are finished.

    `close` aborts what still runs; `fail` ends the iteration with an error. Both are synchronous, so they are
    safe from signal handlers' callbacks and cancelled tasks.
    """

    def __init__(self, streams: Sequence[GenerationStream], *, num_choices: int, timeout: float | None) -> None:
        """timeout: seconds from now until the request fails with `request_timeout`; None for never."""
        self._streams = streams
        self._num_choices = num_choices
        self._deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        self._timeout = timeout
        self._error: Exception | None = None
        self._scope: asyncio.Timeout | None = None
        self._closed = False
        self._num_unfinished = len(streams) * num_choices
        self._pumps: list[asyncio.Task[None]] = []
        self._deltas: AsyncIterator[ChoiceDelta] = self._merged() if len(streams) > 1 else aiter(streams[0])

    def __aiter__(self) -> RunningRequest:
        return self

    async def __anext__(self) -> ChoiceDelta:
        if self._error is not None:
            raise self._error
        try:
            async with asyncio.timeout_at(self._deadline) as self._scope:
                delta = await anext(self._deltas)
        except TimeoutError:
            if self._error is None:
                message = f"the request took longer than this server's limit of {self._timeout:g} seconds"
                self._error = GenerationError(message, code="request_timeout")
            raise self._error from None
        except StopAsyncIteration:
            if self._num_unfinished:
                # Never pass off a part as the whole.
                raise GenerationError("the generation ended early", code="incomplete") from None
            raise
        finally:
            self._scope = None
        self._num_unfinished -= delta.finish_reason is not None
        return delta

    def fail(self, error: Exception) -> None:
        """Raise this from the iteration, now if it is waiting."""
        self._error = self._error or error
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for pump in self._pumps:
            pump.cancel()
        for stream in self._streams:
            stream.close()

    async def _one(self, prompt_index: int) -> AsyncIterator[ChoiceDelta]:
        async for delta in self._streams[prompt_index]:
            yield msgspec.structs.replace(delta, index=prompt_index * self._num_choices + delta.index)

    async def _merged(self) -> AsyncIterator[ChoiceDelta]:
        """All streams' deltas as they come.

        The queue is bounded: the engine side merges what is not taken.
        """
        queue: asyncio.Queue[ChoiceDelta | Exception | None] = asyncio.Queue(maxsize=len(self._streams))

        async def pump(prompt_index: int) -> None:
            try:
                async for delta in self._one(prompt_index):
                    await queue.put(delta)
            except Exception as error:  # noqa: BLE001 - it is raised again by the reader
                await queue.put(error)
            else:
                await queue.put(None)

        self._pumps = [asyncio.create_task(pump(index)) for index in range(len(self._streams))]
        num_open = len(self._streams)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
