"""Which generations are held, for whom, and until when: the one place of these decisions.

A generation that somebody reads lives. One that nobody reads is aborted and forgotten at once, unless it was asked to
be kept: then it goes on, or its log stays, for a stated time after its last reader left (and, where it has an
idempotency key, after its end). All logs that are kept are bounded together, read or not. Beyond that what nobody reads
is forgotten, and of what somebody reads nothing is kept for others. That loses nothing but time: what is asked for
again is computed again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import chain

from reprise.api.event_ids import EventId, cuts
from reprise.api.generation import Generation, LogReader, Submitted
from reprise.errors import GenerationError, OverloadedError


class Slot:
    """The place of an idempotency key: taken by the first request with it, filled when that one is submitted."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        """Of the request that took it."""
        self.generation: Generation | None = None
        self._decided = asyncio.Event()
        self._num_waiting = 0

    async def wait(self) -> Generation | None:
        """The generation, as soon as it is submitted; None where it never will be. Raises OverloadedError."""
        if self._num_waiting >= MAX_WAITING:
            raise OverloadedError("too many requests wait for the first one with their idempotency key")
        self._num_waiting += 1
        try:
            await self._decided.wait()
        finally:
            self._num_waiting -= 1
        return self.generation

    def decide(self, generation: Generation | None) -> None:
        self.generation = generation
        self._decided.set()


MAX_WAITING = 16
"""Requests that wait for the first one with their idempotency key."""
LOOK_INTERVAL = 0.25
"""Seconds between two looks at how much the logs that are kept have grown: nothing is counted at each token."""


class Generations:
    """All that are held. Every method is synchronous, so what is found cannot go before it is read."""

    def __init__(self, *, max_entries: int, timeout: float | None) -> None:
        """max_entries: of all logs that are kept. timeout: seconds that one may take in all."""
        self.read_now: set[Generation] = set()
        """Those that an HTTP request is waiting for."""
        self.idle = asyncio.Event()
        """Set while there are none of these."""
        self.idle.set()
        self.on_begin: list[Callable[[Generation], None]] = []
        """Each is called once a generation, before its first delta. It may add to `generation.on_end`."""
        self.num_attached = 0
        self.num_recomputed = 0
        self.num_joined = 0
        self._max_entries = max_entries
        self._timeout = timeout
        self._draining = False
        self._kept: dict[Generation, asyncio.TimerHandle] = {}
        """Those that nobody reads, in the order in which their readers left, and when each is forgotten."""
        self._sizes: dict[Generation, int] = {}
        """Of all whose logs are kept, in the order in which they began, at the last look."""
        self._num_entries = 0
        """Their sum."""
        self._growing: set[Generation] = set()
        """Those that had not ended then."""
        self._next_look: asyncio.TimerHandle | None = None
        self._by_id: dict[tuple[bytes, str], Generation] = {}
        """By owner and id: a client may name an id that is another's."""
        self._slots: dict[bytes, Slot] = {}
        self._deadlines: dict[Generation, asyncio.TimerHandle] = {}

    @property
    def num_kept(self) -> int:
        """Generations that nobody reads."""
        return len(self._kept)

    def begin(self, submitted: Submitted, sent: EventId | None = None) -> tuple[Generation, LogReader]:
        """Hold what was just submitted to the engine, and read it. sent: where its client stands."""
        generation = Generation(submitted)
        if submitted.retain_seconds or submitted.idempotency_slot is not None:
            generation.keep_log()
            self._by_id.setdefault((submitted.owner, submitted.head.id), generation)
            self._count(generation)
        num_running = len(submitted.streams)

        def stream_ended() -> None:
            nonlocal num_running
            num_running -= 1
            error = next((stream.error for stream in submitted.streams if stream.error is not None), None)
            if not num_running or error is not None:
                # Not within the engine's own call: it is not through with its books.
                asyncio.get_running_loop().call_soon(self._ended, generation)
                # At once: a reader that was woken may leave before that, and would make it a cancelled one.
                generation.end(error)

        for stream in submitted.streams:
            stream.on_end = stream_ended
        if self._timeout is not None:
            timer = asyncio.get_running_loop().call_later(self._timeout, self._overdue, generation)
            self._deadlines[generation] = timer
        for callback in self.on_begin:
            callback(generation)
        return generation, self._read(generation, sent)

    def holds(self, response_id: str, *, owner: bytes) -> bool:
        """Whether that response of that client's can be read from its beginning."""
        return (owner, response_id) in self._by_id

    def find(self, sent: EventId, response_id: str, *, owner: bytes, digest: bytes) -> Generation | None:
        """The generation that an event came from, where it is held whole and that client may have it."""
        generation = self._by_id.get((owner, response_id))
        if generation is None:
            return None
        submitted, origin = generation.submitted, sent.origin
        facts = (submitted.head.created, submitted.head.extension.seed)
        same = submitted.digest == digest and facts == (origin.created, origin.seed)
        return generation if same else None

    def attach(self, generation: Generation, sent: EventId | None = None) -> LogReader:
        """One more reader, from the beginning. sent: where its client stands. Raises OverloadedError."""
        return self._read(generation, sent)

    def leave(self, generation: Generation, reader: LogReader) -> None:
        """A reader is through, or gone. Idempotent."""
        reader.close()
        if reader in generation.readers:
            generation.readers.remove(reader)
            generation.drop_passed()
            self._settle(generation)

    def slot(self, key: bytes) -> Slot | None:
        """Who was first with that idempotency key."""
        return self._slots.get(key)

    def take_slot(self, key: bytes, digest: bytes) -> Slot:
        """Be the first with that key. The caller has it decided, whatever happens."""
        slot = self._slots[key] = Slot(digest)
        return slot

    def give_up_slot(self, key: bytes) -> None:
        """The first one with that key came to nothing: the next one is the first."""
        self._slots.pop(key).decide(None)

    def fail_read(self, error: Exception) -> None:
        """End all that somebody reads with an error."""
        for generation in list(self.read_now):
            self._fail(generation, error)

    def drain(self) -> None:
        """Keep nothing any more that nobody reads."""
        self._draining = True
        for generation in list(self._kept):
            self._forget(generation)

    def _read(self, generation: Generation, sent: EventId | None = None) -> LogReader:
        reader = generation.read(cuts=None if sent is None else cuts(sent.positions))
        self._unkeep(generation)
        self.read_now.add(generation)
        self.idle.clear()
        return reader

    def _settle(self, generation: Generation) -> None:
        """Decide about a generation that may have lost its last reader, or has ended."""
        if generation.readers:
            return
        self.read_now.discard(generation)
        seconds = self._seconds_to_keep(generation)
        is_kept = generation in self._sizes and seconds > 0
        if not is_kept or generation.error is not None or self._draining:
            self._forget(generation)
        else:
            self._unkeep(generation)
            self._kept[generation] = asyncio.get_running_loop().call_later(seconds, self._forget, generation)
            if generation.ended:
                generation.submitted.ticket.release()
            self._measure(generation)
            self._make_room()
        if not self.read_now:
            self.idle.set()

    def _seconds_to_keep(self, generation: Generation) -> float:
        """From now on."""
        submitted, timer = generation.submitted, self._kept.get(generation)
        left = submitted.retain_seconds
        if timer is not None:
            left = timer.when() - asyncio.get_running_loop().time()
        return max(left, submitted.keep_seconds_after_end)

    def _unkeep(self, generation: Generation) -> None:
        timer = self._kept.pop(generation, None)
        if timer is not None:
            timer.cancel()

    def _count(self, generation: Generation) -> None:
        """From now on its log is one of those that are kept."""
        self._sizes[generation] = 0
        self._growing.add(generation)
        self._measure(generation)
        if self._next_look is None:
            self._next_look = asyncio.get_running_loop().call_later(LOOK_INTERVAL, self._look)

    def _measure(self, generation: Generation) -> None:
        size = generation.num_entries
        self._num_entries += size - self._sizes[generation]
        self._sizes[generation] = size

    def _look(self) -> None:
        """See what has grown. Again in a while, unless all have ended."""
        for generation in self._growing:
            self._measure(generation)
        self._growing = {generation for generation in self._growing if not generation.ended}
        self._make_room()
        self._next_look = None
        if self._growing:
            self._next_look = asyncio.get_running_loop().call_later(LOOK_INTERVAL, self._look)

    def _make_room(self) -> None:
        """Keep less until the rest is small enough.

        First forget what nobody reads, longest kept first, finished ones before running ones. Then release what is
        read, oldest first; but not a finished one that is read again, which has no ticket and so has to count here.
        """
        if self._num_entries <= self._max_entries:
            return
        unread = list(self._kept)
        candidates = chain(
            (one for one in unread if one.ended),
            (one for one in unread if not one.ended),
            (one for one in list(self._sizes) if one.readers and not one.submitted.ticket.released),
        )
        for generation in candidates:
            if generation.readers:
                self._release(generation)
            else:
                self._forget(generation)
            if self._num_entries <= self._max_entries:
                return

    def _release(self, generation: Generation) -> None:
        """Keep its log for nobody: it is theirs who read it now, and lives as long as they do."""
        self._hide(generation)
        self._uncount(generation)
        generation.release_log()

    def _uncount(self, generation: Generation) -> None:
        self._num_entries -= self._sizes.pop(generation, 0)
        self._growing.discard(generation)

    def _ended(self, generation: Generation) -> None:
        """Every choice is complete, or one has failed."""
        generation.submitted.ticket.end()
        if generation.error is not None:
            self._hide(generation)
            generation.abort()
        if generation in self._kept:
            self._settle(generation)

    def _overdue(self, generation: Generation) -> None:
        if generation.ended:
            return
        message = f"the request took longer than this server's limit of {self._timeout:g} seconds"
        self._fail(generation, GenerationError(message, code="request_timeout"))

    def _fail(self, generation: Generation, error: Exception) -> None:
        """Whoever reads gets the error. What is complete stays so for others."""
        for reader in generation.readers:
            reader.fail(error)
        if not generation.ended:
            generation.end(error)
            generation.submitted.ticket.end()
            self._hide(generation)
            generation.abort()
            self._settle(generation)

    def _hide(self, generation: Generation) -> None:
        """Have nobody find it any more."""
        submitted = generation.submitted
        name = (submitted.owner, submitted.head.id)
        if self._by_id.get(name) is generation:
            del self._by_id[name]
        key = submitted.idempotency_slot
        slot = self._slots.get(key) if key is not None else None
        if key is not None and slot is not None and slot.generation is generation:
            del self._slots[key]

    def _forget(self, generation: Generation) -> None:
        self._hide(generation)
        self._unkeep(generation)
        self._uncount(generation)
        deadline = self._deadlines.pop(generation, None)
        if deadline is not None:
            deadline.cancel()
        generation.abort()
        generation.submitted.ticket.release()
