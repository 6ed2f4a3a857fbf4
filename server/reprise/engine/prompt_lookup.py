"""Guesses of what a sequence says next, from what it has said before: speculation without a second model.

The tokens that followed the last place where its last tokens stood already are proposed as a draft. The model computes
the draft in one step, and what it would have chosen anyway is kept. Pure: derived from the token log alone.
"""

from __future__ import annotations

from reprise.engine.sequence import Sequence

NGRAM_SIZES = (4, 3, 2)
"""Of the last tokens that are looked for, the longest first."""
MAX_DRAFT = 7
REST = 16
"""Tokens that a sequence says without a draft after drafts of which nothing was kept."""


class PromptLookup:
    """The drafts of one sequence. How long they are follows how much of them is kept."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._places: dict[tuple[int, ...], int] = {}
        """Of each run of tokens that was followed by another: where the last such one is."""
        self._num_indexed = 0
        self._length = 2
        self._resting_until = 0

    def propose(self, most: int) -> tuple[int, ...]:
        """At most `most` tokens that may come next; none where nothing is found, or guessing does not pay now."""
        token_ids = self._sequence.token_ids
        self._catch_up(token_ids)
        length = min(most, self._length)
        if length <= 0 or len(token_ids) < self._resting_until:
            return ()
        for size in NGRAM_SIZES:
            place = self._places.get(tuple(token_ids[-size:]))
            if place is not None:
                return tuple(token_ids[place : place + length])
        return ()

    def note(self, num_proposed: int, num_kept: int) -> None:
        """What became of a draft."""
        if num_kept == num_proposed:
            self._length = min(MAX_DRAFT, 2 * self._length)
        else:
            self._length = num_kept or self._length // 2
            if self._length == 0:
                self._length = 1
                self._resting_until = self._sequence.num_tokens + REST

    def _catch_up(self, token_ids: list[int]) -> None:
        """Index the runs that end before the last token: what follows them is known."""
        for end in range(self._num_indexed, len(token_ids)):
            for size in NGRAM_SIZES:
                if end >= size:
                    self._places[tuple(token_ids[end - size : end])] = end
        self._num_indexed = len(token_ids)
