"""The deltas of one request on their way from the engine to its readers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

import msgspec

from reprise.errors import GenerationError
from reprise.types import ChoiceDelta, GenerationRequest

MAX_MERGED = 256
"""Deltas of a log that a reader makes into one: a few milliseconds in which the event loop does nothing else."""


class RequestStream:
    """The deltas of one request: a log that the engine writes and any number of readers follow.

    Deltas are kept as they were put. What the only reader has passed is dropped at once, unless `retained` was
    set before: then the log is complete, and a reader that comes later reads it from its beginning.
    """

    def __init__(self, request: GenerationRequest, on_close: Callable[[RequestStream], None]) -> None:
        """on_close: aborts what still runs."""
        self.request = request
        self.sequence_ids: list[int] = []
        self.retained = False
        self.num_entries = 0
        """Size of a retained log: tokens, and the alternatives in their log-probabilities."""
        self.error: Exception | None = None
        self.closed = False
        self.on_end: Callable[[], None] | None = None
        """Called once, when the last choice has finished or the request has failed."""
        self._on_close = on_close
        self._deltas: list[ChoiceDelta] = []
        self._num_dropped = 0
        self._num_open = request.num_choices
        self._readers: list[tuple[Reader, int]] = []
        self._own_reader: Reader | None = None

    @property
    def finished(self) -> bool:
        """Whether every choice is complete."""
        return self._num_open == 0

    @property
    def complete(self) -> bool:
        """Whether nothing was dropped, so that there is something to read from the beginning."""
        return self._num_dropped == 0

    def __aiter__(self) -> Reader:
        """The deltas as one reader of this stream alone sees them: always the same one."""
        if self._own_reader is None:
            self._own_reader = Reader([self])
        return self._own_reader

    async def __anext__(self) -> ChoiceDelta:
        return await anext(aiter(self))

    def close(self) -> None:
        """Abort what still runs. Idempotent, and never awaits: it is safe in a cancelled task."""
        if not self.closed:
            self.closed = True
            self._notify()
            self._on_close(self)

    def put(self, delta: ChoiceDelta) -> None:
        """Add to the log: of a choice, what its next token brings."""
        self._deltas.append(delta)
        if self.retained:
            self.num_entries += _num_entries(delta)
        if delta.finish_reason is not None:
            self._num_open -= 1
        self._notify()
        if self._num_open == 0:
            self._end()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what is in the log."""
        self.error = self.error or error
        self._notify()
        self._end()

    def read_from(self, position: int, *, limit: int | None = None) -> list[ChoiceDelta]:
        """What was put from that position on, at most `limit` deltas of it."""
        begin = position - self._num_dropped
        taken = self._deltas[begin : None if limit is None else begin + limit]
        if begin == 0 and not self.retained and len(self._readers) == 1:
            del self._deltas[: len(taken)]
            self._num_dropped += len(taken)
        return taken

    def add_reader(self, reader: Reader, number: int) -> None:
        """Tell `reader.notice(number)` of every change from now on. Raises ValueError where the log is not complete."""
        if not self.complete:
            raise ValueError("the beginning of this log is gone")
        self._readers.append((reader, number))

    def remove_reader(self, reader: Reader) -> None:
        self._readers = [(other, number) for other, number in self._readers if other is not reader]

    def _notify(self) -> None:
        for reader, number in self._readers:
            reader.notice(number)

    def _end(self) -> None:
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()


class Reader:
    """Follows the logs of one or several streams from their beginning, until all of their choices are complete.

    What came since the last delta of a choice is one delta, up to MAX_MERGED: a slow reader gets fewer and larger
    ones. Choice `j` of stream number `s` has the index `j` plus the number of choices of the streams before.
    """

    def __init__(self, streams: Sequence[RequestStream], *, cuts: Mapping[int, int] | None = None) -> None:
        """cuts: of a choice, the number of tokens at which a delta is to end, whatever is there to be merged."""
        self._streams = streams
        counts = [stream.request.num_choices for stream in streams]
        self._offsets = [0, *accumulate(counts)]
        self._num_unfinished = self._offsets.pop()
        self._positions = [0] * len(streams)
        self._until_cut = {index: num_tokens for index, num_tokens in (cuts or {}).items() if num_tokens}
        self._fresh = dict.fromkeys(range(len(streams)))
        self._behind = False
        """Whether the last look at the logs left a part of them, so that others are let run before the next."""
        self._pending: deque[ChoiceDelta] = deque()
        self._waiting: asyncio.Future[None] | None = None
        """Of the one that waits for a change; it is cheaper than an event."""
        self._failure: Exception | None = None
        self._cut_off = False
        self._error: Exception | None = None
        for number, stream in enumerate(streams):
            stream.add_reader(self, number)

    def __aiter__(self) -> Reader:
        return self

    async def __anext__(self) -> ChoiceDelta:
        """Raises GenerationError or UnavailableError where the generation cannot be completed."""
        while True:
            if self._error is not None:
                raise self._error
            if self._pending:
                return self._pending.popleft()
            if self._fresh:
                if self._behind:
                    await asyncio.sleep(0)
                self._collect()
            elif self._failure is not None:
                raise self._failure
            elif not self._num_unfinished:
                raise StopAsyncIteration
            elif self._cut_off:
                # Never pass off a part as the whole.
                raise GenerationError("the generation ended early", code="incomplete")
            else:
                self._waiting = asyncio.get_running_loop().create_future()
                await self._waiting

    def notice(self, number: int) -> None:
        """Something changed in that stream."""
        self._fresh[number] = None
        self._wake()

    def fail(self, error: Exception) -> None:
        """Raise this, now if somebody waits, and before anything that is still to be read."""
        self._error = self._error or error
        self._wake()

    def close(self) -> None:
        """Leave the logs. Idempotent."""
        for stream in self._streams:
            stream.remove_reader(self)

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _collect(self) -> None:
        """Take what the logs have, a delta a choice, or of long ones the next part."""
        fresh, self._fresh = self._fresh, {}
        self._behind = False
        for number in fresh:
            stream, offset = self._streams[number], self._offsets[number]
            deltas = stream.read_from(self._positions[number], limit=MAX_MERGED)
            self._positions[number] += len(deltas)
            if len(deltas) == MAX_MERGED:
                self._fresh[number] = None
                self._behind = True
            groups = [deltas] if len(deltas) == 1 and not self._until_cut else self._groups(deltas, offset)
            for group in groups:
                delta = fold(group)
                self._num_unfinished -= delta.finish_reason is not None
                self._pending.append(msgspec.structs.replace(delta, index=offset + delta.index) if offset else delta)
            self._failure = self._failure or stream.error
            self._cut_off = self._cut_off or (stream.closed and not stream.finished)

    def _groups(self, deltas: Iterable[ChoiceDelta], offset: int) -> list[list[ChoiceDelta]]:
        """Deltas that become one: of one choice, and of one side of its cut."""
        groups: list[list[ChoiceDelta]] = []
        unclosed: dict[int, list[ChoiceDelta]] = {}
        for delta in deltas:
            group = unclosed.get(delta.index)
            if group is None:
                group = unclosed[delta.index] = []
                groups.append(group)
            group.append(delta)
            if self._reaches_cut(delta, offset + delta.index):
                del unclosed[delta.index]
        return groups

    def _reaches_cut(self, delta: ChoiceDelta, index: int) -> bool:
        left = self._until_cut.get(index)
        if left is None:
            return False
        left -= len(delta.token_ids)
        if left < 0 or (left and delta.finish_reason is not None):
            self.fail(GenerationError("no part of this answer ends where the client left it", code="cannot_resume"))
        if left > 0:
            self._until_cut[index] = left
            return False
        del self._until_cut[index]
        return True


def merge(first: ChoiceDelta, second: ChoiceDelta) -> ChoiceDelta:
    """Two deltas of one choice as one."""
    return fold([first, second])


def fold(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """Deltas of one choice, at least one, as one. A response is this, over all of its deltas."""
    first, last = deltas[0], deltas[-1]
    if first is last:
        return first
    logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    return ChoiceDelta(
        index=first.index,
        text="".join([delta.text for delta in deltas]),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[entry for entries in logprobs for entry in entries] if logprobs else None,
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        num_cached_tokens=max([delta.num_cached_tokens for delta in deltas]),
    )


def _num_entries(delta: ChoiceDelta) -> int:
    num_entries = len(delta.token_ids)
    for entry in delta.logprobs or ():
        num_entries += 1 + len(entry.top)
    for scored in delta.prompt_logprobs or ():
        num_entries += 1 + len(scored.top) if scored is not None else 1
    return num_entries
