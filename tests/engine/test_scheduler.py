"""The scheduler under random arrivals, aborts and preemptions: nothing lost, nothing twice, nobody starves."""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reprise.engine.block_pool import BlockPool
from reprise.engine.drafter import Draft, Drafter
from reprise.engine.scheduler import Batch, ScheduledSequence, Scheduler, SchedulingLimits
from reprise.engine.sequence import Sequence, SequenceStatus
from reprise.engine.step_limit import GOOD_STEPS
from reprise.types import SamplingParams


def make_sequence(
    sequence_id: int,
    num_prompt_tokens: int,
    max_tokens: int = 8,
    *,
    use_cache: bool = True,
    first_token: int | None = None,
) -> Sequence:
    first = sequence_id * 1000 if first_token is None else first_token
    return Sequence(
        sequence_id,
        choice_index=0,
        prompt_token_ids=list(range(first, first + num_prompt_tokens)),
        sampling=SamplingParams(seed=0, max_tokens=max_tokens, use_cache=use_cache),
    )


def make_scheduler(num_blocks: int = 16, block_size: int = 4, **limits: int | bool) -> Scheduler:
    values = {"max_num_seqs": 4, "max_num_batched_tokens": 16, **limits}
    return Scheduler(
        SchedulingLimits(**values),  # type: ignore[arg-type]  # ints and bools by name
        BlockPool(num_blocks, block_size),
        Drafter([Forecast()], 1 << 20) if limits.get("max_draft_rows") else None,
    )


class Forecast:
    """Guesses the tokens of every other sequence, not always right."""

    cost = 0.0

    def knows(self, sequence: Sequence) -> bool:
        return sequence.sequence_id % 2 == 0

    def guess(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, Draft]:
        return {
            sequence: ((sequence.token_ids[-1] + sequence.num_tokens // 6) % 3,) * length
            for sequence, length in lengths.items()
            if self.knows(sequence)
        }

    def forget(self, sequence: Sequence) -> None:
        pass


def next_token(sequence: Sequence) -> int:
    """It depends on the sequence alone, and repeats itself for a while."""
    return (sequence.token_ids[-1] + sequence.num_tokens // 6) % 3


def complete(scheduler: Scheduler, batch: Batch) -> list[Sequence]:
    """What the engine core does after a step."""
    finished = []
    for scheduled in batch:
        completes = scheduled.completes_pass
        scheduler.advance(scheduled)
        if completes:
            sequence = scheduled.sequence
            num_before = sequence.num_tokens
            sequence.token_ids.append(next_token(sequence))
            for guess in scheduled.draft_token_ids:
                if guess != sequence.token_ids[-1]:
                    break
                sequence.token_ids.append(next_token(sequence))
            assert sequence.num_output_tokens <= sequence.sampling.max_tokens
            if sequence.num_output_tokens == sequence.sampling.max_tokens:
                assert scheduler.finish(sequence)
                finished.append(sequence)
            else:
                scheduler.keep_drafts(scheduled, sequence.num_tokens - num_before - 1)
    scheduler.check()
    return finished


def test_a_prompt_that_is_scored_is_cut_to_few_rows_of_logits() -> None:
    scheduler = make_scheduler(num_blocks=500, max_num_batched_tokens=1000)
    sampling = SamplingParams(seed=0, max_tokens=8, num_prompt_logprobs=1)
    scheduler.add(Sequence(0, choice_index=0, prompt_token_ids=[5] * 600, sampling=sampling))
    scheduler.add(make_sequence(1, 700))
    scheduler.add(Sequence(2, choice_index=0, prompt_token_ids=[6] * 300, sampling=sampling))
    sizes = []
    for _ in range(5):
        batch = scheduler.schedule()
        sizes.append({s.sequence.sequence_id: s.num_tokens for s in batch})
        complete(scheduler, batch)
    # Of all that are scored together no more than so many.
    assert sizes == [{0: 256, 1: 700}, {1: 1, 0: 256}, {1: 1, 0: 88, 2: 168}, {0: 1, 1: 1, 2: 132}, {0: 1, 1: 1, 2: 1}]


def test_prompts_that_are_scored_leave_the_rest_of_the_budget_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reprise.engine.scheduler.MAX_SCORED_ROWS", 8)
    scheduler = make_scheduler(64, max_num_batched_tokens=32)
    sampling = SamplingParams(seed=0, max_tokens=8, num_prompt_logprobs=1)
    for sequence_id in (0, 1, 2):
        scheduler.add(Sequence(sequence_id, choice_index=0, prompt_token_ids=[5] * 12, sampling=sampling))
    scheduler.add(make_sequence(3, 20))
    sizes = []
    for _ in range(4):
        batch = scheduler.schedule()
        sizes.append({s.sequence.sequence_id: s.num_tokens for s in batch})
        complete(scheduler, batch)
    assert sizes == [{0: 8, 3: 20}, {0: 4, 1: 4, 3: 1}, {0: 1, 1: 8, 3: 1}, {0: 1, 1: 1, 2: 8, 3: 1}]


def test_a_running_prompt_that_may_not_be_scored_further_leaves_the_rest_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reprise.engine.scheduler.MAX_SCORED_ROWS", 8)
    scheduler = make_scheduler(64, max_num_batched_tokens=32)
    sampling = SamplingParams(seed=0, max_tokens=8, num_prompt_logprobs=1)
    first, second = (Sequence(n, choice_index=0, prompt_token_ids=[5] * 20, sampling=sampling) for n in (0, 1))
    first.max_chunk = 4
    for sequence in (first, second, make_sequence(2, 60)):
        scheduler.add(sequence)
    complete(scheduler, scheduler.schedule())
    first.max_chunk = None
    scheduler.restart(first)
    batch = scheduler.schedule()
    assert {s.sequence.sequence_id: s.num_tokens for s in batch} == {0: 8, 2: 24}


def test_a_long_prompt_is_cut_to_the_budget_and_decoding_goes_on_beside_it() -> None:
    scheduler = make_scheduler(num_blocks=64)
    short, long = make_sequence(1, 3), make_sequence(2, 40)
    scheduler.add(short)
    scheduler.add(long)
    sizes = []
    for _ in range(4):
        batch = scheduler.schedule()
        sizes.append([(s.sequence.sequence_id, s.num_tokens) for s in batch])
        complete(scheduler, batch)
    assert sizes == [[(1, 3), (2, 13)], [(1, 1), (2, 15)], [(1, 1), (2, 12)], [(1, 1), (2, 1)]]


def test_a_draft_leaves_its_sequence_before_those_that_read_what_it_writes() -> None:
    """A step that fails is computed in halves, the first entries first."""
    scheduler = make_scheduler(num_blocks=64, max_draft_rows=8)
    writer = make_sequence(2, 7)
    scheduler.add(writer)
    complete(scheduler, scheduler.schedule())
    reader = make_sequence(3, 0)
    reader.token_ids[:] = [*writer.token_ids, 5]
    reader.num_prompt_tokens = len(reader.token_ids)
    scheduler.add(reader)
    batch = scheduler.schedule()
    assert reader.block_ids[:2] == writer.block_ids[:2]
    assert [(s.sequence, s.start, s.num_tokens, bool(s.draft_token_ids)) for s in batch] == [
        (writer, 7, 1, True),
        (reader, 8, 1, False),
    ]


def test_without_chunks_a_pass_is_whole_or_waits() -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_batched_tokens=20, chunked=False)
    scheduler.add(make_sequence(1, 12))
    scheduler.add(make_sequence(2, 12))
    first = scheduler.schedule()
    assert [s.num_tokens for s in first] == [12]
    complete(scheduler, first)
    assert sorted(s.num_tokens for s in scheduler.schedule()) == [1, 12]


def test_when_blocks_run_out_the_youngest_waits_at_its_old_place() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=32)
    old, young, third = (make_sequence(i, 7, max_tokens=6) for i in (1, 2, 3))
    for sequence in (old, young, third):
        scheduler.add(sequence)
    complete(scheduler, scheduler.schedule())
    complete(scheduler, scheduler.schedule())
    assert (old.status, young.status) == (SequenceStatus.RUNNING, SequenceStatus.RUNNING)
    batch = scheduler.schedule()
    assert [s.sequence for s in batch] == [old]
    assert (young.status, young.num_computed_tokens, young.block_ids) == (SequenceStatus.WAITING, 0, [])
    order = []
    while scheduler.has_work:
        order += complete(scheduler, batch)
        batch = scheduler.schedule()
    assert order == [old, young, third]


def test_a_block_that_was_never_computed_is_not_found() -> None:
    """A sequence preempted in the same call that scheduled it must not leave its blocks in the prefix index."""
    scheduler = make_scheduler(num_blocks=5, block_size=2, max_num_batched_tokens=64)
    recomputing = make_sequence(1, 6, max_tokens=3, use_cache=False)
    young = make_sequence(2, 3, max_tokens=3)
    scheduler.add(recomputing)
    scheduler.add(young)
    digests = []
    while scheduler.num_preemptions == 0:
        before = young.num_computed_tokens
        batch = scheduler.schedule()
        if scheduler.num_preemptions:
            digests = [young.digest(i, 2) for i in range(before // 2, young.num_tokens // 2)]
        complete(scheduler, batch)
    assert digests
    assert all(scheduler.pool.find(digest) is None for digest in digests)


def test_recomputing_sequences_take_turns_with_prompts() -> None:
    """`use_cache=False` computes everything at each token; a later prompt still gets its first token soon."""
    scheduler = make_scheduler(num_blocks=64, max_num_batched_tokens=16)
    scheduler.add(make_sequence(1, 16, max_tokens=50, use_cache=False))
    scheduler.add(make_sequence(2, 16, max_tokens=50, use_cache=False))
    late = make_sequence(3, 30, max_tokens=2)
    for _ in range(6):
        complete(scheduler, scheduler.schedule())
    scheduler.add(late)
    steps = 0
    while late.num_output_tokens == 0:
        complete(scheduler, scheduler.schedule())
        steps += 1
    assert steps <= 12


def test_while_memory_is_short_the_youngest_wait_at_their_old_place() -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_seqs=4, max_num_batched_tokens=64)
    sequences = [make_sequence(i, 5, max_tokens=200) for i in (1, 2, 3, 4)]
    for sequence in sequences:
        scheduler.add(sequence)
    complete(scheduler, scheduler.schedule())
    for _ in range(3):
        scheduler.step_limit.note(short=True)
    batch = scheduler.schedule()
    assert [s.sequence for s in batch] == sequences[:1]
    assert [s.status for s in sequences[1:]] == [SequenceStatus.WAITING] * 3
    sizes = []
    for _ in range(2 * GOOD_STEPS + 2):
        complete(scheduler, batch)
        scheduler.step_limit.note(short=False)
        batch = scheduler.schedule()
        sizes.append(len(batch))
    assert sizes == sorted(sizes)
    assert set(sizes) == {1, 2, 4}


def test_a_pass_that_cannot_be_cut_is_made_alone_while_memory_is_short() -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_seqs=4, max_num_batched_tokens=64, chunked=False)
    for _ in range(4):
        scheduler.step_limit.note(short=True)
    long, short = make_sequence(1, 60, max_tokens=3), make_sequence(2, 3, max_tokens=3)
    scheduler.add(long)
    scheduler.add(short)
    assert scheduler.step_limit.num_tokens < 60
    order = []
    while scheduler.has_work:
        order += complete(scheduler, scheduler.schedule())
    assert order == [long, short]
    scheduler.add(make_sequence(3, 4))
    (scheduled,) = scheduler.schedule()
    assert not scheduler.shrink(scheduled)


def test_a_chunk_that_was_too_large_is_halved_down_to_the_smallest() -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_seqs=4, max_num_batched_tokens=64)
    sequence = make_sequence(1, 60)
    scheduler.add(sequence)
    sizes = []
    for _ in range(10):
        (scheduled,) = scheduler.schedule()
        sizes.append(scheduled.num_tokens)
        if not scheduler.shrink(scheduled):
            break
        scheduler.restart(sequence)
    assert sizes == [60, 30, 16]


def test_an_abort_ends_waiting_running_and_preempted_sequences_alike() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=32)
    sequences = [make_sequence(i, 7, max_tokens=6) for i in (1, 2, 3)]
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.num_preemptions == 0:
        complete(scheduler, scheduler.schedule())
    for sequence in sequences:
        assert scheduler.finish(sequence)
        assert not scheduler.finish(sequence)
        scheduler.check()
    assert not scheduler.has_work
    assert scheduler.pool.num_free == 4


class Work:
    """Counts what a scheduler does: calls of functions and methods, C's as well, and looks at those that wait."""

    def __init__(self) -> None:
        self.amount = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        profiler = sys.getprofile()
        gc.disable()  # what is called when it has collected is nobody's work
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(profiler)
            gc.enable()

    def _note(self, _frame: Any, event: str, _argument: Any) -> None:
        self.amount += event in {"call", "c_call"}


class Waiting(OrderedDict[int, Sequence]):
    """A scheduler's queue in which each sequence that is looked at in passing is work."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def __iter__(self) -> Iterator[int]:
        for key in super().__iter__():
            self._work.amount += 1
            yield key

    def values(self) -> Any:
        for value in super().values():
            self._work.amount += 1
            yield value


def work_of_steps(num_waiting: int, *, num_blocks: int) -> list[int]:
    """Of each step, while up to four run, one of them ends now and then, and so many more wait."""
    scheduler, work = make_scheduler(num_blocks=num_blocks, max_num_batched_tokens=32), Work()
    scheduler._waiting = Waiting(work)
    for sequence_id in range(4 + num_waiting):
        scheduler.add(make_sequence(sequence_id, 7, max_tokens=3 + sequence_id % 4))
    amounts = []
    for _ in range(12):
        before = work.amount
        with work.counted():
            batch = scheduler.schedule()
        for scheduled in batch:
            with work.counted():
                scheduler.advance(scheduled)
            sequence = scheduled.sequence
            sequence.token_ids.append(5)
            if sequence.num_output_tokens >= sequence.sampling.max_tokens:
                with work.counted():
                    scheduler.finish(sequence)
        amounts.append(work.amount - before)
    assert scheduler.num_waiting > num_waiting // 2
    return amounts


@pytest.mark.parametrize("num_blocks", [64, 6])
def test_scheduling_does_not_take_more_work_where_more_wait(num_blocks: int) -> None:
    """Where places are full, and where blocks are: the next one is let in when one has ended."""
    few, many = work_of_steps(30, num_blocks=num_blocks), work_of_steps(3000, num_blocks=num_blocks)
    assert few == many


def test_a_budget_that_would_starve_decoding_is_refused() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        SchedulingLimits(max_num_seqs=8, max_num_batched_tokens=4)


ARRIVAL = st.tuples(
    st.integers(1, 18),  # prompt tokens
    st.integers(1, 9),  # max tokens
    st.booleans(),  # use_cache
    st.integers(0, 3),  # which of a few prompts: equal ones share blocks
    st.integers(0, 12),  # step of arrival
    st.one_of(st.none(), st.integers(0, 20)),  # step of an abort
    st.one_of(st.none(), st.integers(1, 12)),  # step in which it begins anew, as after a neighbour's failure
)
SHORTAGES = st.sets(st.integers(0, 30))
"""Steps that run out of memory, so that later ones are smaller."""


class Content:
    """What a cache would hold: for each slot the tokens up to the one whose key was written there last."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._slots: dict[tuple[int, int], tuple[int, ...]] = {}

    def compute(self, batch: Batch) -> None:
        """A step of one entry after the other: all writes of it, then all reads, which must find its own prefix.

        So any beginning of a batch can be computed before the rest, as after a failure.
        """
        written = set()
        for scheduled in batch:
            token_ids = self._token_ids(scheduled)
            for position in range(scheduled.start, len(token_ids)):
                slot = self._slot(scheduled.sequence, position)
                assert slot not in written, "two sequences write to one slot"
                written.add(slot)
                self._slots[slot] = token_ids[: position + 1]
            for position in range(len(token_ids)):
                found = self._slots.get(self._slot(scheduled.sequence, position))
                assert found == token_ids[: position + 1], "a slot that is somebody else's"

    @staticmethod
    def _token_ids(scheduled: ScheduledSequence) -> tuple[int, ...]:
        return tuple(scheduled.sequence.token_ids[: scheduled.start] + scheduled.token_ids)

    def _slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_ids[position // self._block_size], position % self._block_size


@settings(max_examples=250, deadline=None)
@given(
    arrivals=st.lists(ARRIVAL, min_size=1, max_size=12),
    num_blocks=st.integers(7, 24),
    block_size=st.sampled_from([4, 8]),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(5, 40),
    chunked=st.booleans(),
    shortages=SHORTAGES,
    max_draft_rows=st.sampled_from([0, 0, 3, 8]),
)
def test_every_request_ends_exactly_once_and_reads_what_was_computed_for_it(
    arrivals: list[tuple[int, int, bool, int, int, int | None, int | None]],
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    budget: int,
    *,
    chunked: bool,
    shortages: set[int],
    max_draft_rows: int,
) -> None:
    scheduler = make_scheduler(
        num_blocks,
        block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget if chunked else budget + 28,
        chunked=chunked,
        max_draft_rows=max_draft_rows,
    )
    content = Content(block_size)
    sequences = [
        make_sequence(i, prompt, tokens, use_cache=cache, first_token=which * 1000)
        for i, (prompt, tokens, cache, which, *_) in enumerate(arrivals)
    ]
    ended: list[Sequence] = []
    for step in range(2000):
        for sequence, (*_, arrival, abort, _anew) in zip(sequences, arrivals, strict=True):
            if arrival == step:
                scheduler.add(sequence)
            if abort is not None and arrival + abort == step and scheduler.finish(sequence):
                ended.append(sequence)
        if step > 40 and not scheduler.has_work:
            break
        batch = scheduler.schedule()
        assert bool(batch) == scheduler.has_work, "work that nobody does"
        assert sum(s.num_rows for s in batch) <= scheduler._limits.max_num_batched_tokens
        content.compute(batch)
        restarted = [s for s in batch if arrivals[s.sequence.sequence_id][-1] == step]
        for scheduled in restarted:
            scheduler.restart(scheduled.sequence)
        ended += complete(scheduler, [s for s in batch if s not in restarted])
        scheduler.step_limit.note(short=step in shortages)
    assert sorted(s.sequence_id for s in ended) == sorted(s.sequence_id for s in sequences)
    assert scheduler.pool.num_free == num_blocks
    for sequence in sequences:
        assert sequence.status is SequenceStatus.FINISHED


def simulate(seed: int) -> None:
    """A long random life of a scheduler that is short of blocks: equal prompts, aborts, and sequences begun anew."""
    random = Random(seed)
    block_size = random.choice([1, 2, 4])
    scheduler = make_scheduler(
        random.randint(-(-30 // block_size), 40 // block_size + 2),
        block_size,
        max_num_seqs=random.randint(2, 5),
        max_num_batched_tokens=random.randint(5, 14),
        max_draft_rows=random.choice([0, 5, 9]),
    )
    content = Content(block_size)
    alive: dict[int, Sequence] = {}
    for step in range(400):
        if step < 60 and random.random() < 0.5 and len(alive) < 10:
            sequence = make_sequence(
                step,
                random.choice([3, 6, 12, 18]),
                random.randint(1, 11),
                use_cache=random.random() < 0.55,
                first_token=0,
            )
            alive[step] = sequence
            scheduler.add(sequence)
        if alive and random.random() < 0.05:
            scheduler.finish(alive.pop(random.choice(list(alive))))
        batch = scheduler.schedule()
        content.compute(batch)
        anew = [random.choice(batch)] if batch and random.random() < 0.35 else []
        for scheduled in anew:
            if random.random() < 0.3:
                scheduler.shrink(scheduled)
            scheduler.restart(scheduled.sequence)
        scheduler.step_limit.note(short=random.random() < 0.1)
        for sequence in complete(scheduler, [s for s in batch if s not in anew]):
            del alive[sequence.sequence_id]
    assert not scheduler.has_work


@pytest.mark.parametrize("seed", [*range(100), 1436])
def test_a_long_life_short_of_blocks(seed: int) -> None:
    """In seed 1436 a sequence shares blocks that another was to compute, which then has to give them up."""
    simulate(seed)
