"""The draw's noise: a pure function of its four words, uniform, and the same for ever."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reprise.engine.noise import draw_key, gumbel, uniform

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(seed=INT64, choice=st.integers(0, 127), position=st.integers(0, 2**31))
def test_a_key_is_an_int64_and_a_function_of_its_words(seed: int, choice: int, position: int) -> None:
    key = draw_key(seed, choice, position)
    assert -(2**63) <= key < 2**63
    assert key == draw_key(seed, choice, position)
    assert len({key, draw_key(seed, choice + 1, position), draw_key(seed, choice, position + 1)}) == 3


def test_the_numbers_are_these_for_ever() -> None:
    """A change here changes every sampled answer that was ever given: it needs a new fingerprint."""
    values = uniform(torch.tensor([draw_key(42, 1, 7)]), 3)[0].tolist()
    assert values == EXPECTED


def test_a_row_does_not_depend_on_the_others_nor_on_the_vocabulary() -> None:
    keys = [draw_key(1, 0, i) for i in range(5)]
    together = uniform(torch.tensor(keys), 100)
    for row, key in enumerate(keys):
        assert torch.equal(uniform(torch.tensor([key]), 50)[0], together[row, :50])


def test_uniform_fits_a_uniform_distribution() -> None:
    numbers = uniform(torch.tensor([draw_key(seed, 0, 0) for seed in range(2000)]), 50)
    assert 0 < float(numbers.min()) < float(numbers.max()) < 1
    counts = torch.histc(numbers.float(), bins=50, min=0, max=1)
    expected = numbers.numel() / 50
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 100, chi_square  # 49 degrees of freedom: beyond 100 once in 30,000 good generators
    columns = numbers - 0.5
    correlation = float((columns[:, :-1] * columns[:, 1:]).mean() * 12)
    assert abs(correlation) < 5 / math.sqrt(numbers.numel())


def test_the_gumbel_maximum_draws_from_the_softmax() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    keys = torch.tensor([draw_key(9, 0, position) for position in range(20000)])
    drawn = (scores + gumbel(keys, 5)).argmax(dim=-1)
    counts = torch.bincount(drawn, minlength=5).double()
    expected = scores.softmax(-1).double() * len(keys)
    chi_square = float(((counts - expected)[:4] ** 2 / expected[:4]).sum())
    assert counts[4] == 0
    assert chi_square < 21.1, chi_square  # 3 degrees of freedom: beyond 21.1 once in 10,000


@pytest.mark.parametrize(("seed", "token_id"), [(-5371509999066526811, 5), (-3483434102947137779, 4242)])
def test_the_number_next_to_one_stays_below_it(seed: int, token_id: int) -> None:
    """Seeds whose hash has only ones at that token: rounded to 1, its noise would be infinite."""
    keys = torch.tensor([draw_key(seed, 0, 0)])
    assert float(uniform(keys, 5000)[0, token_id]) == 1 - 2.0**-52
    assert torch.isfinite(gumbel(keys, 5000)).all()


EXPECTED = [0.25488227636206456, 0.3855059656649504, 0.5892220802300614]
