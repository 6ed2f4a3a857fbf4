"""How large a step may be while memory is short."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from reprise.engine.step_limit import GOOD_STEPS, MIN_CHUNK, StepLimit


def size(limit: StepLimit) -> tuple[int, int]:
    return limit.num_seqs, limit.num_tokens


def test_one_shortage_changes_nothing() -> None:
    limit = StepLimit(64, 2048)
    for _ in range(5):
        limit.note(short=True)
        assert size(limit) == (64, 2048)
        limit.note(short=False)


def test_shortages_in_a_row_halve_down_to_one_sequence() -> None:
    limit = StepLimit(8, 2048)
    limit.note(short=True)
    sizes = []
    for _ in range(10):
        limit.note(short=True)
        sizes.append(size(limit))
    assert sizes[:4] == [(4, 1024), (2, 512), (1, 256), (1, 128)]
    assert sizes[-1] == (1, MIN_CHUNK)


def test_good_steps_double_up_to_what_was_configured() -> None:
    limit = StepLimit(8, 64)
    for _ in range(4):
        limit.note(short=True)
    sizes = []
    for _ in range(4 * GOOD_STEPS):
        limit.note(short=False)
        sizes.append(size(limit))
    assert sizes[GOOD_STEPS - 2] == (1, 16)
    assert sizes[GOOD_STEPS - 1 :: GOOD_STEPS] == [(2, 16), (4, 32), (8, 64), (8, 64)]


def test_a_shortage_while_it_grows_again_halves_at_once() -> None:
    limit = StepLimit(8, 64)
    for _ in range(3):
        limit.note(short=True)
    for _ in range(GOOD_STEPS):
        limit.note(short=False)
    assert size(limit) == (4, 32)
    limit.note(short=True)
    assert size(limit) == (2, 16)


@settings(deadline=None)
@given(num_seqs=st.integers(1, 100), more=st.integers(0, 3000), steps=st.lists(st.booleans(), max_size=200))
def test_every_running_sequence_can_always_have_its_token(num_seqs: int, more: int, steps: list[bool]) -> None:
    limit = StepLimit(num_seqs, num_seqs + more)
    for short in steps:
        limit.note(short=short)
        assert 1 <= limit.num_seqs <= min(num_seqs, limit.num_tokens)
        assert min(MIN_CHUNK, num_seqs + more) <= limit.num_tokens <= num_seqs + more
