"""Guesses of what sequences say next: where they come from, how long they are, and when there are none.

The model computes a draft in one step, and what it would have chosen anyway is kept. So nothing of this has an effect
on an answer, and all of it can be dropped at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Ordered
from typing import Protocol

from reprise.engine.sequence import Sequence

Draft = tuple[int, ...]
MAX_DRAFT = 7
REST = 16
"""Tokens that a sequence says without guesses of one origin after these did not pay."""
MAX_BALANCE = 4.0
"""Tokens that drafts which paid may lose again before they rest."""


class Guesser(Protocol):
    """One origin of guesses."""

    @property
    def cost(self) -> float:
        """Of one guess, as a share of a step of the model."""

    def knows(self, sequence: Sequence) -> bool:
        """Whether it may ever have a guess about this one."""

    def guess(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, Draft]:
        """For each sequence at most so many tokens, at least 1; those about which nothing is known are left out."""

    def forget(self, sequence: Sequence) -> None:
        """A sequence ended or lost its place: drop whatever is held for it."""


class DraftLength:
    """How long the drafts of one sequence and one origin are: longer while they are right, shorter when not.

    `cost` is what a guess costs: what drafts save, less that, is what they have to gain in the long run.
    """

    def __init__(self, cost: float = 0.0) -> None:
        self._cost = cost
        self._balance = MAX_BALANCE
        self._length = 2
        self._resting_until = 0

    def at(self, num_tokens: int) -> int:
        """For a sequence of so many tokens; 0 while it rests."""
        return 0 if num_tokens < self._resting_until else self._length

    def note(self, num_proposed: int, num_kept: int, num_tokens: int) -> None:
        """What became of a draft. `num_tokens`: of the sequence, after it."""
        self._balance = min(MAX_BALANCE, self._balance + num_kept - self._cost * num_proposed)
        if num_kept == num_proposed:
            self._length = min(MAX_DRAFT, 2 * self._length)
        else:
            self._length = num_kept or self._length // 2
        if self._length == 0 or self._balance < 0:
            self._length = 1
            self._balance = MAX_BALANCE / 2
            self._resting_until = num_tokens + REST


class Drafter:
    """The drafts of all sequences, each from the first of the guessers that has one.

    `num_token_ids`: what the model takes; a draft ends before anything else.
    """

    def __init__(self, guessers: Ordered[Guesser], num_token_ids: int) -> None:
        self._guessers = guessers
        self._num_token_ids = num_token_ids
        self._lengths: dict[Sequence, list[DraftLength]] = {}
        self._origins: dict[Sequence, int] = {}

    def knows(self, sequence: Sequence) -> bool:
        """Whether there may ever be a guess about this one: the same answer for all of its life."""
        return any(guesser.knows(sequence) for guesser in self._guessers)

    def propose(self, most: Mapping[Sequence, int]) -> dict[Sequence, Draft]:
        """What may come next, at most so many tokens of each; sequences without a guess are left out."""
        drafts: dict[Sequence, Draft] = {}
        for origin, guesser in enumerate(self._guessers):
            lengths = {
                sequence: length
                for sequence, limit in most.items()
                if sequence not in drafts and (length := min(limit, self._length(sequence, origin))) > 0
            }
            if not lengths:
                continue
            for sequence, draft in guesser.guess(lengths).items():
                known = self._known(draft)
                if known:
                    drafts[sequence] = known
                    self._origins[sequence] = origin
        return drafts

    def note(self, sequence: Sequence, num_proposed: int, num_kept: int) -> None:
        """What became of the last draft."""
        origin = self._origins.get(sequence)
        if origin is not None:
            self._lengths[sequence][origin].note(num_proposed, num_kept, sequence.num_tokens)

    def forget(self, sequence: Sequence) -> None:
        """A sequence ended or lost its place. Idempotent."""
        self._origins.pop(sequence, None)
        if self._lengths.pop(sequence, None) is not None:
            for guesser in self._guessers:
                guesser.forget(sequence)

    def _length(self, sequence: Sequence, origin: int) -> int:
        lengths = self._lengths.get(sequence)
        if lengths is None:
            lengths = self._lengths[sequence] = [DraftLength(guesser.cost) for guesser in self._guessers]
        return lengths[origin].at(sequence.num_tokens)

    def _known(self, draft: Draft) -> Draft:
        for index, token_id in enumerate(draft):
            if not 0 <= token_id < self._num_token_ids:
                return draft[:index]
        return draft
