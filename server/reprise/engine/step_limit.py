"""How large a step may be while memory is short. Pure: it is told how steps went, and counts."""

from __future__ import annotations

MIN_CHUNK = 16
"""Tokens: the smallest chunk that a pass is cut down to."""
GOOD_STEPS = 32
"""Steps without a shortage after which a step may be twice as large again."""


class StepLimit:
    """How many sequences and tokens a step may have: the configured numbers, halved while memory is short.

    One shortage may be anybody's, and repeating the step in parts is enough; the second in a row halves, down to one
    sequence and MIN_CHUNK tokens, and further ones halve again. GOOD_STEPS without one double.
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._num_halvings = 0
        self._num_good = 0
        self._last_was_short = False

    @property
    def num_tokens(self) -> int:
        floor = min(MIN_CHUNK, self._max_num_batched_tokens)
        return max(floor, self._max_num_batched_tokens >> self._num_halvings)

    @property
    def num_seqs(self) -> int:
        return min(max(1, self._max_num_seqs >> self._num_halvings), self.num_tokens)

    def note(self, *, short: bool) -> None:
        """A step was made, and whether it ran out of memory although it had several sequences to share it."""
        if short:
            self._num_good = 0
            if (self._last_was_short or self._num_halvings) and (self.num_seqs > 1 or self.num_tokens > MIN_CHUNK):
                self._num_halvings += 1
        elif self._num_halvings:
            self._num_good += 1
            if self._num_good >= GOOD_STEPS:
                self._num_good = 0
                self._num_halvings -= 1
        self._last_was_short = short
