"""Which sequences compute which tokens in the next step. Pure: no clock, no tensor, no text.

Rules that live here:
 1. Every running sequence that needs one token gets it; what is left of the token budget goes to longer passes
    (prompts, recomputations, `use_cache=False`) in the order of their turns, in chunks where the tier can. Those
    that wait to be admitted have their turn in the same order.
 2. A pass takes a new turn when it is complete, so nobody that starts over at each token holds up a prompt.
 3. Admission is first come, first served, and nobody overtakes: a sequence enters when the blocks for all of its
    tokens are free. But prompts that are scored are passed by while others of them have all the rows of a step.
 4. When blocks run out, the youngest running sequence gives up all of its own and waits at its old place.
 5. `finish` alone ends a sequence, exactly once.
 6. Where nothing but single tokens is computed, drafts of the sequences fill the step up to `max_draft_rows`. Their
    keys and values lie behind the sequence's own tokens; what is not kept of them is written over.
 7. While memory is short a step is smaller: the youngest running sequences beyond `StepLimit` wait at their old place.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import OrderedDict, deque
from dataclasses import dataclass
from itertools import chain, islice

from reprise.engine.block_pool import BlockPool
from reprise.engine.drafter import Drafter
from reprise.engine.sequence import Sequence, SequenceStatus
from reprise.engine.step_limit import MIN_CHUNK, StepLimit


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Compute tokens `start` to `start + num_tokens` of a sequence."""

    sequence: Sequence
    start: int
    num_tokens: int
    draft_token_ids: tuple[int, ...] = ()
    """Guesses of what comes next, computed behind the sequence's own tokens."""

    @property
    def end(self) -> int:
        """Of the sequence's own tokens."""
        return self.start + self.num_tokens

    @property
    def num_rows(self) -> int:
        """Tokens that are computed, drafts among them."""
        return self.num_tokens + len(self.draft_token_ids)

    @property
    def token_ids(self) -> list[int]:
        """Those that are computed."""
        return [*self.sequence.token_ids[self.start : self.end], *self.draft_token_ids]

    @property
    def completes_pass(self) -> bool:
        return self.end == self.sequence.num_tokens

    @property
    def num_logit_rows(self) -> int:
        """How many of the last positions need logits: all to score a prompt, else those that are sampled."""
        if self.sequence.scores_prompt:
            return self.num_tokens
        return 1 + len(self.draft_token_ids) if self.completes_pass else 0


Batch = list[ScheduledSequence]

MAX_SCORED_ROWS = 256
"""Of prompts that are scored, computed in a step or looked at at a time: each has logits of the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class SchedulingLimits:
    """`chunked`: whether a pass may be spread over steps; without, a pass fits the budget whole or waits.

    `max_draft_rows`: tokens of a step that drafts may fill up, 0 for none.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    chunked: bool = True
    prefix_cache: bool = True
    max_draft_rows: int = 0

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs, or decoding would starve")


class _Plan:
    """The batch while it is being made, and the token budget that is left."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._scheduled: dict[int, ScheduledSequence] = {}

    @property
    def batch(self) -> Batch:
        return list(self._scheduled.values())

    @property
    def num_scored_rows(self) -> int:
        return sum(s.num_tokens for s in self._scheduled.values() if s.sequence.scores_prompt)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.sequence_id in self._scheduled

    def add(self, scheduled: ScheduledSequence) -> None:
        """In place of what there is of the sequence: those behind it may read what it writes in this step."""
        sequence_id = scheduled.sequence.sequence_id
        before = self._scheduled.get(sequence_id)
        self.budget += (before.num_rows if before is not None else 0) - scheduled.num_rows
        self._scheduled[sequence_id] = scheduled

    def remove(self, sequence: Sequence) -> ScheduledSequence | None:
        scheduled = self._scheduled.pop(sequence.sequence_id, None)
        if scheduled is not None:
            self.budget += scheduled.num_rows
        return scheduled


class Scheduler:
    """Sequences waiting and running over one block pool. `drafter`: whom to ask for drafts; None for none."""

    def __init__(self, limits: SchedulingLimits, pool: BlockPool, drafter: Drafter | None = None) -> None:
        self._limits = limits
        self._pool = pool
        self._drafter = drafter
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._preempted: list[Sequence] = []
        self._running: list[Sequence] = []
        self._next_turn = 0
        self.step_limit = StepLimit(limits.max_num_seqs, limits.max_num_batched_tokens)
        self.num_preemptions = 0

    @property
    def pool(self) -> BlockPool:
        return self._pool

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._preempted)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting or self._preempted)

    def add(self, sequence: Sequence) -> None:
        """Enqueue. The caller guarantees that the sequence at its longest fits the pool."""
        sequence.arrival = sequence.turn = self._take_turn()
        self._waiting[sequence.sequence_id] = sequence

    def schedule(self) -> Batch:
        """The next step's work. Empty only where there is nothing to do."""
        while len(self._running) > self.step_limit.num_seqs:
            self._preempt(self._running[-1])
        plan = _Plan(self.step_limit.num_tokens)
        by_turn = sorted(self._running, key=lambda s: s.turn)
        passes = deque(s for s in by_turn if s.num_uncomputed_tokens > 1)
        for sequence in by_turn:
            if sequence.num_uncomputed_tokens == 1:
                self._continue(sequence, plan)
        admitting = True
        while admitting or passes:
            candidate = self._next_waiting(plan) if admitting else None
            if candidate is not None and not (passes and passes[0].turn < candidate.turn):
                admitting = self._admit(candidate, plan)
            elif passes:
                if not self._continue(passes.popleft(), plan):
                    break
            else:
                break
        if self._drafter is not None and self._limits.max_draft_rows:
            self._add_drafts(plan, self._drafter)
        return plan.batch

    def advance(self, scheduled: ScheduledSequence) -> None:
        """The step has computed this. Called before the new token, if any, is appended."""
        sequence = scheduled.sequence
        sequence.num_computed_tokens = scheduled.end
        if scheduled.completes_pass:
            sequence.turn = self._take_turn()
            if not sequence.sampling.use_cache:
                sequence.num_computed_tokens = 0

    def keep_drafts(self, scheduled: ScheduledSequence, num_kept: int) -> None:
        """So many tokens of the draft were chosen, and appended with one more. Called after `advance`."""
        sequence = scheduled.sequence
        sequence.num_computed_tokens += num_kept
        sequence.num_kept_drafts = num_kept
        if self._drafter is not None and scheduled.draft_token_ids:
            self._drafter.note(sequence, len(scheduled.draft_token_ids), num_kept)

    def restart(self, sequence: Sequence) -> None:
        """A running sequence begins its pass anew: what it shares with a failed one is not to be trusted."""
        self.taint(sequence, 0)
        self._preempt(sequence)

    def recompute(self, sequence: Sequence) -> bool:
        """Have a running sequence begin anew and share with nobody. False where it found nothing in the cache."""
        if sequence.num_found_tokens == 0:
            return False
        sequence.computes_all = True
        self.restart(sequence)
        return True

    def shrink(self, scheduled: ScheduledSequence) -> bool:
        """A chunk ran out of memory by itself: have it computed in smaller ones. False where there are none."""
        if not self._limits.chunked or scheduled.num_tokens <= MIN_CHUNK:
            return False
        scheduled.sequence.max_chunk = max(MIN_CHUNK, scheduled.num_tokens // 2)
        return True

    def taint(self, sequence: Sequence, start: int) -> None:
        """What this sequence's blocks hold from token `start` on is not to be trusted: nobody shall find it."""
        self._pool.forget(sequence.block_ids[start // self._pool.block_size :])

    def finish(self, sequence: Sequence) -> bool:
        """End a sequence, whatever its status. False where it had ended before."""
        if sequence.status is SequenceStatus.FINISHED:
            return False
        if self._drafter is not None:
            self._drafter.forget(sequence)
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._release(sequence)
        elif self._waiting.pop(sequence.sequence_id, None) is None:
            self._preempted.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        return True

    def check(self) -> None:
        """Assert the rules of this file that can be seen from outside a step."""
        self._pool.check([sequence.block_ids for sequence in self._running])
        assert [s.arrival for s in self._running] == sorted(s.arrival for s in self._running)
        assert [s.arrival for s in self._preempted] == sorted(s.arrival for s in self._preempted)
        assert len(self._running) <= self._limits.max_num_seqs
        assert all(s.status is SequenceStatus.RUNNING for s in self._running)
        assert all(not s.block_ids and s.num_computed_tokens == 0 for s in self._preempted)

    def _next_waiting(self, plan: _Plan) -> Sequence | None:
        """The first that could be admitted: prompts that are scored leave the others what they may not use."""
        first = islice(chain(self._preempted, self._waiting.values()), self._limits.max_num_seqs)

        def may_go_on(sequence: Sequence) -> bool:
            return not (self._limits.chunked and sequence.scores_prompt) or plan.num_scored_rows < MAX_SCORED_ROWS

        return next(filter(may_go_on, first), None)

    def _chunk(self, sequence: Sequence, num_tokens: int, plan: _Plan) -> int:
        """How much of a pass of `num_tokens` fits what is left of the budget; 0 where it has to wait."""
        if not self._limits.chunked:
            # A pass that is larger than the step limit can only be made by itself.
            fits = num_tokens <= plan.budget or (not plan.batch and num_tokens <= self._limits.max_num_batched_tokens)
            return num_tokens if fits else 0
        most = MAX_SCORED_ROWS - plan.num_scored_rows if sequence.scores_prompt else num_tokens
        return min(num_tokens, plan.budget, sequence.max_chunk or num_tokens, most)

    def _continue(self, sequence: Sequence, plan: _Plan) -> bool:
        """Schedule more of a running sequence, if its prompt may be scored further. False: the budget is spent."""
        if sequence.status is not SequenceStatus.RUNNING or sequence in plan:
            # It gave up its place in this step, and may have been given one again.
            return True
        num_tokens = self._chunk(sequence, sequence.num_uncomputed_tokens, plan)
        if num_tokens == 0:
            return self._limits.chunked and plan.budget > 0
        if self._make_room(sequence, sequence.num_computed_tokens + num_tokens, plan):
            self._schedule(sequence, num_tokens, plan)
        return True

    def _make_room(self, sequence: Sequence, num_tokens: int, plan: _Plan) -> bool:
        """Have blocks for `num_tokens`, preempting from the youngest. False: it had to give up its own."""
        while not self._grow(sequence, num_tokens):
            self._drop(self._running[-1], plan)
            if sequence.status is not SequenceStatus.RUNNING:
                return False
        return True

    def _drop(self, victim: Sequence, plan: _Plan) -> None:
        """Preempt, and undo what this step planned: blocks that it will not compute, and whoever shares them."""
        unscheduled = plan.remove(victim)
        undone: set[int] = set()
        if unscheduled is not None:
            undone.update(victim.block_ids[unscheduled.start // self._pool.block_size :])
            self._pool.forget(undone)
        self._preempt(victim)
        for scheduled in plan.batch:
            if undone.intersection(scheduled.sequence.block_ids):
                self._drop(scheduled.sequence, plan)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        missing = self._pool.num_blocks_for(num_tokens) - len(sequence.block_ids)
        if missing > self._pool.num_free:
            return False
        if missing > 0:
            sequence.block_ids += self._pool.allocate(missing)
        return True

    def _admit(self, sequence: Sequence, plan: _Plan) -> bool:
        """Let a waiting sequence run, with whatever prefix of it is cached. False: there is no room for it."""
        if len(self._running) >= self.step_limit.num_seqs:
            return False
        prefix = self._cached_prefix(sequence)
        for block in prefix:
            self._pool.share(block)
        num_cached = len(prefix) * self._pool.block_size
        missing = self._pool.num_blocks_for(sequence.num_tokens) - len(prefix)
        num_tokens = self._chunk(sequence, sequence.num_tokens - num_cached, plan)
        if missing > self._pool.num_free or num_tokens == 0:
            self._pool.release(reversed(prefix))
            return False
        sequence.block_ids = prefix
        sequence.num_computed_tokens = sequence.num_found_tokens = num_cached
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(num_cached, sequence.num_prompt_tokens)
        if self._waiting.pop(sequence.sequence_id, None) is None:
            self._preempted.remove(sequence)
        sequence.status = SequenceStatus.RUNNING
        bisect.insort(self._running, sequence, key=lambda s: s.arrival)
        grown = self._grow(sequence, num_cached + num_tokens)
        assert grown
        self._schedule(sequence, num_tokens, plan)
        return True

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks to reuse. At least one token is left to compute: it gives the logits."""
        blocks: list[int] = []
        if not self._limits.prefix_cache or not sequence.uses_prefix_cache or sequence.scores_prompt:
            return blocks
        for index in range((sequence.num_tokens - 1) // self._pool.block_size):
            block = self._pool.find(sequence.digest(index, self._pool.block_size))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _schedule(self, sequence: Sequence, num_tokens: int, plan: _Plan) -> None:
        scheduled = ScheduledSequence(sequence, sequence.num_computed_tokens, num_tokens)
        plan.add(scheduled)
        if self._limits.prefix_cache and sequence.uses_prefix_cache:
            # Blocks that were filled by drafts are whole since the last step.
            first = scheduled.start - sequence.num_kept_drafts
            # Findable at once: a step writes all keys and values of a layer before it reads any, so sequences
            # of the same step (the choices of one request) share the prompt that one of them computes.
            for index in range(first // self._pool.block_size, scheduled.end // self._pool.block_size):
                self._pool.register(sequence.block_ids[index], sequence.digest(index, self._pool.block_size))

    def _add_drafts(self, plan: _Plan, drafter: Drafter) -> None:
        """Fill up a step of single tokens with what its sequences may say next, in equal shares."""
        batch = plan.batch
        takers = [s for s in batch if drafter.knows(s.sequence) and s.completes_pass and s.sequence.takes_drafts]
        room = min(self._limits.max_draft_rows - len(batch), plan.budget)
        share = room // len(batch) if batch else 0
        if not takers or share <= 0 or any(scheduled.num_tokens > 1 for scheduled in batch):
            return
        drafts = drafter.propose(
            {
                # The token behind the draft is the last that may come.
                s.sequence: min(share, s.sequence.sampling.max_tokens - s.sequence.num_output_tokens - 1)
                for s in takers
            }
        )
        for scheduled in takers:
            draft = drafts.get(scheduled.sequence, ())
            if draft and self._grow(scheduled.sequence, scheduled.end + len(draft)):
                plan.add(dataclasses.replace(scheduled, draft_token_ids=draft))

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        if self._drafter is not None:
            self._drafter.forget(sequence)
        sequence.num_computed_tokens = sequence.num_kept_drafts = 0
        sequence.status = SequenceStatus.WAITING
        bisect.insort(self._preempted, sequence, key=lambda s: s.arrival)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(reversed(sequence.block_ids))
        sequence.block_ids = []

    def _take_turn(self) -> int:
        self._next_turn += 1
        return self._next_turn
