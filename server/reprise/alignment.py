"""Where an answer stands in a prediction of it. Pure, and a function of the two alone: both processes follow it."""

from __future__ import annotations

from collections.abc import Iterable

MATCH_SIZES = (4, 3, 2)
"""Of the last tokens that are looked for in the prediction after the answer has left it, the longest first."""


class Alignment:
    """Follows an answer through a prediction, token by token.

    The answer is taken to begin where the prediction does. Once it says something else, its last tokens are looked for
    in the prediction: nearest behind the place that it left, else nearest before it.
    """

    def __init__(self, prediction: Iterable[int]) -> None:
        """prediction: token ids; those beyond Unicode's code points end it."""
        self._prediction = _as_text(prediction)
        self._recent = ""
        self._place = 0
        self._is_aligned = True
        self._appeared = bytearray(len(self._prediction))

    @property
    def num_accepted(self) -> int:
        """Tokens of the prediction in which the answer was found."""
        return sum(self._appeared)

    @property
    def num_rejected(self) -> int:
        """Tokens of the prediction in which it was not."""
        return len(self._appeared) - sum(self._appeared)

    def push(self, token_id: int) -> None:
        """The next token of the answer."""
        token = _as_text((token_id,))
        self._recent = (self._recent + token)[-MATCH_SIZES[0] :]
        if self._is_aligned and token and self._prediction.startswith(token, self._place):
            self._appeared[self._place] = 1
            self._place += 1
        else:
            self._is_aligned = self._find()

    def next_token_ids(self, count: int) -> tuple[int, ...]:
        """What the prediction says next, at most `count` tokens; none where the answer is nowhere in it."""
        if not self._is_aligned:
            return ()
        return tuple(map(ord, self._prediction[self._place : self._place + count]))

    def _find(self) -> bool:
        for size in MATCH_SIZES:
            wanted = self._recent[-size:]
            if len(wanted) < size:
                continue
            start = self._prediction.find(wanted, self._place)
            if start < 0:
                start = self._prediction.rfind(wanted, 0, self._place + size - 1)
            if start >= 0:
                self._place = start + size
                self._appeared[start : self._place] = b"\1" * size
                return True
        return False


def _as_text(token_ids: Iterable[int]) -> str:
    """A character a token: texts are searched in linear time, whatever they are."""
    characters = []
    for token_id in token_ids:
        if not 0 <= token_id <= 0x10FFFF:
            break
        characters.append(chr(token_id))
    return "".join(characters)
