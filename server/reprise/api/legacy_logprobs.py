"""The completions endpoint's own form of log-probabilities: parallel arrays with offsets into the text.

A token that is part of a character is spelt `bytes:` and hexadecimal escapes, so that no two look alike. A token
that a stop string cuts in two is listed whole, more than the text has of it; tokens behind the cut are left out.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from reprise.protocol.responses import LegacyLogprobs, finite
from reprise.text.vocabulary import Vocabulary
from reprise.types import LogprobEntry, LogprobToken


class _TextPosition:
    """How many characters the bytes so far have made, invalid ones counted as the decoder replaces them."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_characters = 0

    @property
    def num_characters(self) -> int:
        return self._num_characters

    def move_to(self, num_characters: int) -> None:
        """Go on behind so many characters, unless one has begun that is not complete."""
        if not self._decoder.getstate()[0]:
            self._num_characters = num_characters

    def push(self, data: bytes) -> int:
        """Take in a token's bytes. Returns the index of the character that its first byte belongs to."""
        begun = bool(self._decoder.getstate()[0])
        first = self._decoder.decode(data[:1])
        left = bool(self._decoder.getstate()[0])
        # A character that was begun before is continued, or completed, or else given up as one replacement.
        continues = not first or (len(first) == 1 and not left)
        offset = self._num_characters + (begun and not continues)
        self._num_characters += len(first) + len(self._decoder.decode(data[1:]))
        return offset


class LegacyLogprobsWriter:
    """Writes one choice's arrays piece by piece, and knows how far its text has come.

    An offset is the index, in characters of the choice's text, of the character that the token's first byte
    is in.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._position = _TextPosition()

    def prompt(self, text: str, token_ids: Sequence[int], entries: Sequence[LogprobEntry | None]) -> LegacyLogprobs:
        """The arrays of an echoed prompt; the first token has no probability.

        Special tokens that the tokenizer added are in the arrays and not in the text, nor is a space that it put
        before the text, or behind a special token. What is generated begins where the text ends, also where the
        tokenizer reads another one.
        """
        arrays = LegacyLogprobs([], [], [], [])
        end, begins = 0, True
        for token_id, entry in zip(token_ids, entries, strict=False):
            data = self._vocabulary.data(token_id)
            self._append(arrays, _spelt(data), entry)
            if token_id in self._vocabulary.special_token_ids and not text.startswith(data.decode(), end):
                data = b""
            elif begins and data.startswith(b" ") and not text.startswith(" ", end):
                data = data[1:]
            begins = token_id in self._vocabulary.special_token_ids
            arrays.text_offset.append(self._position.push(data))
            end = self._position.num_characters
        self._position.move_to(len(text))
        return arrays

    def generated(self, entries: Sequence[LogprobEntry]) -> LegacyLogprobs:
        """The arrays of newly generated tokens."""
        arrays = LegacyLogprobs([], [], [], [])
        for entry in entries:
            self._append(arrays, _spelling(entry.token), entry)
            arrays.text_offset.append(self._position.push(entry.token.data))
        return arrays

    def _append(self, arrays: LegacyLogprobs, text: str, entry: LogprobEntry | None) -> None:
        arrays.tokens.append(text)
        arrays.token_logprobs.append(None if entry is None else finite(entry.token.logprob))
        arrays.top_logprobs.append(None if entry is None else _top([*entry.top, entry.token]))


def _spelling(token: LogprobToken) -> str:
    """A token that adds nothing to the text, such as an end token, goes by its name."""
    return _spelt(token.data) if token.data else token.text


def _spelt(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


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
        likely.setdefault(_spelling(token), finite(token.logprob))
    return likely
