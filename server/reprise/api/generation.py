"""One request's generation from its submission until nobody can ask for it any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import msgspec

from reprise.api.admission import Ticket
from reprise.api.head import ResponseHead
from reprise.errors import GenerationError, OverloadedError
from reprise.generation.request_stream import Reader, RequestStream, fold
from reprise.protocol.parameters import GenerationParameters
from reprise.types import ChoiceDelta, GenerationRequest

MAX_READERS = 16
"""Connections that read one generation at once."""
FIXED_ENTRIES = 64
"""What a generation takes besides its tokens, in tokens."""
BODY_BYTES_PER_ENTRY = 4
"""Parsed, the worst JSON takes some twenty times its bytes; a token of a log takes hundreds."""


@dataclass(frozen=True, eq=False)
class Submitted:
    """What is generated, for whom, and how long it is kept."""

    head: ResponseHead
    parameters: GenerationParameters
    """The body as it was validated; its seed may be absent, `head.extension.seed` never is."""
    requests: list[GenerationRequest]
    """One a prompt."""
    streams: Sequence[RequestStream]
    """The log of each of them."""
    ticket: Ticket
    digest: bytes
    """Of the request: equal for equal ones."""
    owner: bytes
    """Who may read it again: a digest of the API key, empty where there are no keys."""
    idempotency_slot: bytes | None = None
    """Where a request with the same key finds it."""
    retain_seconds: float = 0.0
    """How long it goes on, or is kept, after its last reader has left."""
    keep_seconds_after_end: float = 0.0
    num_body_bytes: int = 0
    """Of the request as it came."""
    prompt_digest: bytes = b""
    """Of the prompts' tokens, for those who may read it again."""
    recomputed: bool = False
    """Whether a client brought its id: it has had a part of this response before."""


class LogReader(Reader):
    """A reader that tells how far it has come."""

    @property
    def positions(self) -> Sequence[int]:
        """Of each stream, how many deltas of its log were taken."""
        return self._positions


@dataclass(eq=False)
class Generation:
    """The one object of a generation, running or finished: what was submitted, its log, and who reads it.

    `Generations` decides how long it lives.
    """

    submitted: Submitted
    readers: set[LogReader] = field(default_factory=set)
    ended: bool = False
    """Whether every choice is complete, or never will be."""
    error: Exception | None = None
    """Why it never will be."""
    on_end: list[Callable[[Generation], None]] = field(default_factory=list)
    """Each is called once, in a callback of the event loop of its own."""
    _num_keepers: int = field(default=0, init=False)

    @property
    def head(self) -> ResponseHead:
        return self.submitted.head

    @property
    def num_entries(self) -> int:
        """Size of one that is kept whole, in tokens: body, prompts, parameters, output and log-probabilities."""
        return self._num_entries_before + sum(stream.num_entries for stream in self.submitted.streams)

    @cached_property
    def _num_entries_before(self) -> int:
        """Of what was submitted."""
        num_entries = FIXED_ENTRIES + self.submitted.num_body_bytes // BODY_BYTES_PER_ENTRY
        return num_entries + sum(_num_entries(request) for request in self.submitted.requests)

    def keep_log(self) -> None:
        """Drop nothing of the log from now on. To be called before anything is read, as in `Generations.on_begin`."""
        self._num_keepers += 1
        for stream in self.submitted.streams:
            stream.retained = True

    def release_log(self) -> None:
        """Take one `keep_log` back. With the last one the log is as any other: nobody can begin to read it any more."""
        self._num_keepers -= 1
        self.drop_passed()

    def drop_passed(self) -> None:
        """Where nobody keeps the log any more, drop what its only reader has passed; after that, streams do so."""
        if self._num_keepers or len(self.readers) != 1:
            return
        (reader,) = self.readers
        for stream, position in zip(self.submitted.streams, reader.positions, strict=True):
            if stream.retained:
                stream.retained = False
                # Reading again what the only reader has taken drops it.
                stream.read_from(0, limit=position)

    def read(self, *, cuts: Mapping[int, int] | None = None) -> LogReader:
        """A reader from the beginning. Raises OverloadedError where there are too many.

        cuts: of a choice, the number of tokens at which a delta is to end.
        """
        if len(self.readers) >= MAX_READERS:
            raise OverloadedError(f"this response is already being read {MAX_READERS} times")
        reader = LogReader(self.submitted.streams, cuts=cuts)
        self.readers.add(reader)
        return reader

    def choices(self) -> list[ChoiceDelta]:
        """The deltas of each choice that has begun, as one. Only for a log that was kept from the beginning."""
        deltas: dict[int, list[ChoiceDelta]] = {}
        offset = 0
        for stream in self.submitted.streams:
            for delta in stream.read_from(0):
                deltas.setdefault(offset + delta.index, []).append(delta)
            offset += stream.request.num_choices
        return [msgspec.structs.replace(fold(deltas[index]), index=index) for index in sorted(deltas)]

    def end(self, error: Exception | None) -> None:
        """Nothing comes any more. error: why not all is there. Idempotent."""
        if self.ended:
            return
        self.ended, self.error = True, error
        for callback in self.on_end:
            asyncio.get_running_loop().call_soon(callback, self)

    def abort(self) -> None:
        """Have the engine forget what still runs. Idempotent."""
        for stream in self.submitted.streams:
            stream.close()
        self.end(GenerationError("the generation was cancelled", code="cancelled"))


def _num_entries(request: GenerationRequest) -> int:
    """Size of one prompt with its parameters, in tokens."""
    sampling = request.sampling
    words = [*sampling.bad_words, *request.stop.strings]
    num_word_entries = sum(1 + len(word) // BODY_BYTES_PER_ENTRY for word in words)
    texts = (request.prompt_token_ids, request.prediction_token_ids)
    lists = (*texts, sampling.logit_bias, sampling.allowed_token_ids or (), sampling.stop_token_ids)
    return num_word_entries + sum(map(len, lists))
