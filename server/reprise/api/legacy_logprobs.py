"""The completions endpoint's own form of log-probabilities: parallel arrays with offsets into the text."""

from __future__ import annotations

from collections.abc import Sequence

from reprise.api.chat import finite
from reprise.protocol.responses import LegacyLogprobs
from reprise.text.vocabulary import Vocabulary
from reprise.types import LogprobEntry, LogprobToken

_CONTINUATION_MASK, _CONTINUATION = 0xC0, 0x80


class LegacyLogprobsWriter:
    """Writes one choice's arrays piece by piece, and knows how far its text has come.

    An offset is the index, in characters of the choice's text, of the character that the token's first byte
    is in.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._num_characters = 0

    def prompt(self, text: str, token_ids: Sequence[int], entries: Sequence[LogprobEntry | None]) -> LegacyLogprobs:
        """The arrays of an echoed prompt; the first token has no probability.

        Special tokens that the tokenizer added are in the arrays and not in the text.
        """
        arrays = LegacyLogprobs([], [], [], [])
        position = 0
        for token_id, entry in zip(token_ids, entries, strict=False):
            data = self._vocabulary.data(token_id)
            self._append(arrays, data.decode(errors="replace"), entry)
            if token_id in self._vocabulary.special_token_ids and not text.startswith(data.decode(), position):
                data = b""
            arrays.text_offset.append(self._offset(data))
            self._num_characters += _num_begun(data)
            position = self._num_characters
        self._num_characters = len(text)
        return arrays

    def generated(self, entries: Sequence[LogprobEntry]) -> LegacyLogprobs:
        """The arrays of newly generated tokens."""
        arrays = LegacyLogprobs([], [], [], [])
        for entry in entries:
            self._append(arrays, entry.token.text, entry)
            arrays.text_offset.append(self._offset(entry.token.data))
            self._num_characters += _num_begun(entry.token.data)
        return arrays

    def _append(self, arrays: LegacyLogprobs, text: str, entry: LogprobEntry | None) -> None:
        arrays.tokens.append(text)
        arrays.token_logprobs.append(None if entry is None else finite(entry.token.logprob))
        arrays.top_logprobs.append(None if entry is None else _top([*entry.top, entry.token]))

    def _offset(self, data: bytes) -> int:
        continues = bool(data) and data[0] & _CONTINUATION_MASK == _CONTINUATION
        return max(0, self._num_characters - continues)


def extend(first: LegacyLogprobs | None, second: LegacyLogprobs) -> LegacyLogprobs:
    """Both as one; `first` is changed."""
    first = first or LegacyLogprobs([], [], [], [])
    first.tokens.extend(second.tokens)
    first.token_logprobs.extend(second.token_logprobs)
    first.top_logprobs.extend(second.top_logprobs)
    first.text_offset.extend(second.text_offset)
    return first


def _top(tokens: Sequence[LogprobToken]) -> dict[str, float]:
    """Text to log-probability, the chosen token always among them.

    Of tokens with one text the likeliest counts.
    """
    likely: dict[str, float] = {}
    for token in tokens:
        likely.setdefault(token.text, finite(token.logprob))
    return likely


def _num_begun(data: bytes) -> int:
    """Characters that begin in these bytes of UTF-8."""
    return sum(byte & _CONTINUATION_MASK != _CONTINUATION for byte in data)
