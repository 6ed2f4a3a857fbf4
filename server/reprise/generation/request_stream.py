"""The deltas of one request on their way from the engine to its reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from reprise.types import ChoiceDelta, GenerationRequest


class RequestStream:
    """The deltas of one request: a mailbox with one slot a choice, merged while the reader is slow."""

    def __init__(self, request: GenerationRequest, on_close: Callable[[RequestStream], None]) -> None:
        self.request = request
        self.sequence_ids: list[int] = []
        self._on_close = on_close
        self._slots: dict[int, ChoiceDelta] = {}
        self._num_open = request.num_choices
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._closed = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> ChoiceDelta:
        while not self._slots:
            if self._error is not None:
                raise self._error
            if self._num_open == 0 or self._closed:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._slots.pop(next(iter(self._slots)))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._changed.set()
            self._on_close(self)

    def put(self, delta: ChoiceDelta) -> None:
        """Add to what the reader has not yet taken."""
        slot = self._slots.get(delta.index)
        self._slots[delta.index] = delta if slot is None else merge(slot, delta)
        if delta.finish_reason is not None:
            self._num_open -= 1
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what is in the mailbox."""
        self._error = self._error or error
        self._changed.set()


def merge(first: ChoiceDelta, second: ChoiceDelta) -> ChoiceDelta:
    """Two deltas of one choice as one. A response is this, over all of its deltas."""
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = [*(first.logprobs or []), *(second.logprobs or [])]
    return ChoiceDelta(
        index=first.index,
        text=first.text + second.text,
        token_ids=[*first.token_ids, *second.token_ids],
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs if first.prompt_logprobs is not None else second.prompt_logprobs,
        finish_reason=second.finish_reason,
        stop_reason=second.stop_reason,
        num_cached_tokens=max(first.num_cached_tokens, second.num_cached_tokens),
    )
