"""Guesses from what a sequence has said before: what followed the last place where its last tokens stood already."""

from __future__ import annotations

from collections.abc import Mapping

from reprise.engine.drafter import Draft
from reprise.engine.sequence import Sequence

NGRAM_SIZES = (4, 3, 2)
"""Of the last tokens that are looked for, the longest first."""


class PromptLookup:
    """Implements `drafter.Guesser`. Pure: derived from the token logs alone."""

    cost = 0.0

    def __init__(self) -> None:
        self._indexes: dict[Sequence, _Index] = {}

    def knows(self, sequence: Sequence) -> bool:  # noqa: ARG002 # about all of them
        return True

    def guess(self, lengths: Mapping[Sequence, int]) -> dict[Sequence, Draft]:
        drafts = {}
        for sequence, length in lengths.items():
            index = self._indexes.get(sequence)
            if index is None:
                index = self._indexes[sequence] = _Index()
            draft = index.following(sequence.token_ids, length)
            if draft:
                drafts[sequence] = draft
        return drafts

    def forget(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence, None)


class _Index:
    """Of each run of tokens that was followed by another: where the last such one is."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def following(self, token_ids: list[int], length: int) -> Draft:
        """`token_ids`: of the sequence, which has only grown since the last time."""
        self._catch_up(token_ids)
        for size in NGRAM_SIZES:
            place = self._places.get(tuple(token_ids[-size:]))
            if place is not None:
                return tuple(token_ids[place : place + length])
        return ()

    def _catch_up(self, token_ids: list[int]) -> None:
        """Index the runs that end before the last token: what follows them is known."""
        for end in range(self._num_indexed, len(token_ids)):
            for size in NGRAM_SIZES:
                if end >= size:
                    self._places[tuple(token_ids[end - size : end])] = end
        self._num_indexed = len(token_ids)
