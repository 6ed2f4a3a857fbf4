"""What the engine generated for one choice, as the deltas of its answer."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from reprise.errors import GenerationError
from reprise.ipc.messages import SequenceOutput
from reprise.text.detokenizer import Detokenizer
from reprise.text.stop import StopMatcher
from reprise.text.tokenizer import Tokenizer
from reprise.types import (
    ChoiceDelta,
    FinishReason,
    GenerationRequest,
    LogprobEntry,
    LogprobToken,
    TokenLogprobs,
)


@dataclass(frozen=True)
class _HeldEntry:
    """A logprob entry that waits for its text: characters [start, end) of the choice's text before any cut."""

    entry: LogprobEntry
    start: int
    end: int


class OutputProcessor:
    """Folds the engine's outputs for one choice into deltas. Pure: no clock, no asyncio.

    The deltas concatenate to the same choice however the ids were grouped into outputs. A stop string is
    matched in the text of all tokens, but only a completion at token number `min_tokens` or later counts. An
    end token spells nothing, except a stop token where the request includes what stopped it.
    """

    def __init__(self, index: int, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self._index = index
        self._vocabulary = tokenizer.vocabulary
        self._min_tokens = request.sampling.min_tokens
        self._wants_logprobs = request.sampling.num_logprobs is not None
        self._includes_stop = request.stop.include_in_output
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=request.skip_special_tokens)
        self._matcher = StopMatcher(request.stop)
        self._num_decoded = 0
        self._num_cached_tokens: int | None = None
        self._prompt_told = False
        self._held_entries: deque[_HeldEntry] = deque()
        self.output_token_ids: list[int] = []
        """The log: every id received, up to the one that completed a stop string."""
        self.finished = False

    def push(self, output: SequenceOutput) -> ChoiceDelta | None:
        """The delta of one step's output; None where there is nothing to tell.

        Raises GenerationError where the sequence failed in the engine, or ids are missing before these.
        """
        if self.finished:
            return None
        if output.finish_reason is FinishReason.ERROR:
            self.finished = True
            raise GenerationError(
                output.error_message or "The generation failed in the engine.",
                code=output.error_code or "internal_error",
            )
        if output.finish_reason is FinishReason.ABORT:
            self.finished = True
            return None
        self._check_position(output)
        if self._num_cached_tokens is None:
            self._num_cached_tokens = output.num_cached_tokens
        delta = ChoiceDelta(index=self._index, token_ids=[], num_cached_tokens=self._num_cached_tokens)
        if output.prompt_logprobs is not None and not self._prompt_told:
            delta.prompt_logprobs = [None if entry is None else self._entry(entry) for entry in output.prompt_logprobs]
            self._prompt_told = True
        pieces = self._take_tokens(output, delta)
        if output.finish_reason is not None and self._matcher.matched is None:
            pieces.append(self._decoded(self._detokenizer.flush()))
            pieces.append(self._matcher.flush())
        delta.text = "".join(pieces)
        if output.finish_reason is not None or self._matcher.matched is not None:
            self._finish(output, delta)
        if self._wants_logprobs:
            delta.logprobs = self._released_entries()
        return delta if _tells_something(delta) else None

    def _check_position(self, output: SequenceOutput) -> None:
        expected = len(self.output_token_ids)
        if output.token_ids and output.position != expected:
            self.finished = True
            raise GenerationError(
                f"The engine's tokens go on at position {output.position}, not at {expected}.",
                code="internal_error",
            )

    def _take_tokens(self, output: SequenceOutput, delta: ChoiceDelta) -> list[str]:
        """Log and decode the ids, until a stop string completes. Returns the pieces of released text."""
        pieces: list[str] = []
        ended = output.finish_reason is FinishReason.STOP
        silent_end = ended and not (self._includes_stop and output.stop_token_id is not None)
        for n, token_id in enumerate(output.token_ids):
            self.output_token_ids.append(token_id)
            delta.token_ids.append(token_id)
            if silent_end and n == len(output.token_ids) - 1:
                break
            start = self._num_decoded
            pieces.append(self._decoded(self._detokenizer.feed(token_id)))
            if output.logprobs is not None and self._wants_logprobs:
                end = self._num_decoded + self._detokenizer.has_pending
                self._held_entries.append(_HeldEntry(self._entry(output.logprobs[n], generated=True), start, end))
            if self._matcher.matched is not None:
                break
        return pieces

    def _decoded(self, text: str) -> str:
        """Newly decoded text through the stop matcher."""
        self._num_decoded += len(text)
        return self._matcher.feed(text, enabled=len(self.output_token_ids) >= self._min_tokens)

    def _finish(self, output: SequenceOutput, delta: ChoiceDelta) -> None:
        if self._matcher.matched is not None:
            delta.finish_reason, delta.stop_reason = FinishReason.STOP, self._matcher.matched
        elif output.finish_reason is FinishReason.STOP:
            delta.finish_reason, delta.stop_reason = FinishReason.STOP, output.stop_token_id
        elif output.finish_reason is FinishReason.LENGTH:
            delta.finish_reason = FinishReason.LENGTH
        self.finished = delta.finish_reason is not None

    def _released_entries(self) -> list[LogprobEntry]:
        """The entries whose text is out. At the end also the one that a stop string's cut goes through."""
        released = self._matcher.num_released
        entries = []
        while self._held_entries:
            held = self._held_entries[0]
            if not (held.end <= released or (self.finished and held.start < released)):
                break
            entries.append(self._held_entries.popleft().entry)
        return entries

    def _entry(self, logprobs: TokenLogprobs, *, generated: bool = False) -> LogprobEntry:
        token = self._token(logprobs.token_id, logprobs.logprob)
        if generated and self._detokenizer.spells_nothing(token.token_id):
            token = LogprobToken(token.token_id, token.text, b"", token.logprob)
        return LogprobEntry(token, [self._token(token_id, logprob) for token_id, logprob in logprobs.top])

    def _token(self, token_id: int, logprob: float) -> LogprobToken:
        data = self._vocabulary.data(token_id)
        return LogprobToken(token_id, data.decode(errors="replace"), data, logprob)


def _tells_something(delta: ChoiceDelta) -> bool:
    return bool(
        delta.text
        or delta.token_ids
        or delta.logprobs
        or delta.prompt_logprobs is not None
        or delta.finish_reason is not None
    )
