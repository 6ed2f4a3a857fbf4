"""Guesses from a smaller model: it draws ahead with the very noise that the served model will draw with.

A draw depends on seed, choice, position and token alone. So a guess is right where the scores of both models, with the
same noise, have the same maximum: sampled answers are guessed about as often as the models agree.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from reprise.engine.block_pool import BlockPool
from reprise.engine.drafter import Draft
from reprise.engine.model_runner import ModelRunner
from reprise.engine.sampler import Sampler
from reprise.engine.scheduler import ScheduledSequence
from reprise.engine.sequence import Sequence, SequenceStatus
from reprise.types import SamplingParams

logger = logging.getLogger(__name__)

_UNUSED = SamplingParams(seed=0, max_tokens=0)
"""Guesses are drawn by the parameters of the sequence that they are for."""


class DraftModel:
    """Implements `drafter.Guesser`.

    `pool`: of the draft model's own keys and values. `num_token_ids`: those that it takes. `max_tokens`: the longest
    sequence that it takes. `catch_up_tokens`: how many it computes in a step at most before it guesses: a sequence that
    it has not caught up with has no guesses yet. `cost`: of one guess, as a share of a step of the served model.
    """

    def __init__(
        self,
        runner: ModelRunner,
        pool: BlockPool,
        sampler: Sampler,
        *,
        num_token_ids: int,
        max_tokens: int,
        catch_up_tokens: int,
        cost: float,
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._sampler = sampler
        self._num_token_ids = num_token_ids
        self._max_tokens = max_tokens
        self._catch_up_tokens = catch_up_tokens
        self.cost = cost
        self._followed: dict[Sequence, _Followed] = {}
        self._failed = False

    def knows(self, sequence: Sequence) -> bool:  # noqa: ARG002 # about all of them
        return True

    def guess(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, Draft]:
        """Nothing, from now on, once the draft model has failed: guesses are not worth an answer."""
        if self._failed:
            return {}
        try:
            return self._guess(lengths)
        except Exception as error:  # noqa: BLE001 # whatever a model's code raises must not end those that it guesses for
            logger.warning("the draft model failed with %s: there are no guesses of it any more", type(error).__name__)
            self._failed = True
            for sequence in [*self._followed]:
                self.forget(sequence)
            return {}

    def forget(self, sequence: Sequence) -> None:
        followed = self._followed.pop(sequence, None)
        if followed is not None:
            self._pool.release(reversed(followed.block_ids))

    def check(self) -> None:
        """Assert that the pool's blocks are those of the sequences that are followed."""
        self._pool.check([followed.block_ids for followed in self._followed.values()])

    def _guess(self, lengths: Mapping[Sequence, int]) -> dict[Sequence, Draft]:
        drafts: dict[Sequence, list[int]] = {}
        batch = list(self._catching_up(lengths))
        ahead = 0
        while batch:
            logits = self._runner.run([scheduled for _, scheduled in batch])
            for _, scheduled in batch:
                scheduled.sequence.num_computed_tokens = scheduled.end
            batch = [(sequence, scheduled) for sequence, scheduled in batch if scheduled.completes_pass]
            if not batch:
                break
            guesses = self._sampler.choose([sequence for sequence, _ in batch], logits, [ahead] * len(batch))
            ahead += 1
            following = []
            for (sequence, scheduled), token_id in zip(batch, guesses, strict=True):
                draft, followed = drafts.setdefault(sequence, []), scheduled.sequence
                draft.append(token_id)
                if len(draft) < lengths[sequence] and followed.num_tokens < self._max_tokens:
                    followed.token_ids.append(token_id)
                    following.append((sequence, ScheduledSequence(followed, followed.num_computed_tokens, 1)))
            batch = following
        return {sequence: tuple(draft) for sequence, draft in drafts.items()}

    def _catching_up(self, lengths: Mapping[Sequence, int]) -> Iterator[tuple[Sequence, ScheduledSequence]]:
        """What to compute before the first guesses, of those sequences that there is room for."""
        budget = self._catch_up_tokens
        for sequence, length in lengths.items():
            if sequence.num_tokens > self._max_tokens:
                continue
            followed = self._followed.get(sequence)
            if followed is None:
                followed = self._followed[sequence] = _Followed(sequence)
            followed.follow(sequence, self._num_token_ids)
            num_tokens = min(followed.num_uncomputed_tokens, budget)
            longest = min(sequence.num_tokens + length, self._max_tokens)
            if followed.is_strange or num_tokens == 0 or not self._grow(followed, longest, lengths):
                continue
            budget -= num_tokens
            yield sequence, ScheduledSequence(followed, followed.num_computed_tokens, num_tokens)

    def _grow(self, followed: Sequence, num_tokens: int, needed: Mapping[Sequence, int]) -> bool:
        """Have blocks for so many tokens, if need be those of sequences that are not `needed` now."""
        missing = self._pool.num_blocks_for(num_tokens) - len(followed.block_ids)
        for other in [sequence for sequence in self._followed if sequence not in needed]:
            if missing <= self._pool.num_free:
                break
            self.forget(other)
        if missing > self._pool.num_free:
            return False
        if missing > 0:
            followed.block_ids += self._pool.allocate(missing)
        return True


class _Followed(Sequence):
    """A sequence as the draft model has it: what it said, and behind it what was guessed last."""

    def __init__(self, sequence: Sequence) -> None:
        super().__init__(sequence.sequence_id, choice_index=0, prompt_token_ids=[], sampling=_UNUSED)
        self.status = SequenceStatus.RUNNING
        self.is_strange = False
        """Whether it has a token that the draft model does not know."""
        self._num_followed = 0

    def follow(self, sequence: Sequence, num_token_ids: int) -> None:
        """Take in what was said since the last time, in place of what was guessed of it and not said."""
        same = self._num_followed
        while same < min(self.num_tokens, sequence.num_tokens) and self.token_ids[same] == sequence.token_ids[same]:
            same += 1
        new = sequence.token_ids[same:]
        self.token_ids[same:] = new
        # The last token is computed again, if need be: its logits are wanted.
        self.num_computed_tokens = min(self.num_computed_tokens, same, self.num_tokens - 1)
        self._num_followed = self.num_tokens
        self.is_strange = self.is_strange or any(token_id >= num_token_ids for token_id in new)
