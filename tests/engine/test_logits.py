"""Each batched processor against transformers' own on the same logits, row by row, in mixed batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from reprise.engine import logits as processors

VOCAB_SIZE = 97


def scores(rows: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(6, VOCAB_SIZE, generator=generator) * 3
    values[0, 10:20] = values[0, 10]  # ties
    values[1, 5:90] = float("-inf")  # a mask came first
    return values[:rows]


CASES: list[tuple[Callable[[Tensor, Tensor], Tensor], Callable[[float], LogitsProcessor], list[float]]] = [
    (processors.temperature, TemperatureLogitsWarper, [0.1, 0.7, 1.0, 1.3, 2.0, 0.01]),
    (processors.top_k, lambda k: TopKLogitsWarper(int(k)), [1, 2, 5, 50, 97, 500]),
    (processors.top_p, TopPLogitsWarper, [0.01, 0.3, 0.5, 0.9, 0.999, 0.1]),
    (processors.min_p, MinPLogitsWarper, [0.01, 0.1, 0.5, 0.9, 1.0, 0.05]),
    (processors.typical_p, TypicalLogitsWarper, [0.05, 0.2, 0.5, 0.9, 0.99, 0.7]),
]


@pytest.mark.parametrize(("batched", "reference", "values"), CASES, ids=lambda c: getattr(c, "__name__", None))
def test_equals_transformers(
    batched: Callable[[Tensor, Tensor], Tensor],
    reference: Callable[[float], LogitsProcessor],
    values: list[float],
) -> None:
    before = scores()
    actual = batched(before, torch.tensor(values))
    for row, value in enumerate(values):
        expected = reference(value)(torch.zeros(1, 1, dtype=torch.int64), before[row : row + 1])
        torch.testing.assert_close(actual[row : row + 1], expected)
    torch.testing.assert_close(before, scores(), msg="the input was changed")


@pytest.mark.parametrize(("batched", "reference", "values"), CASES[2:], ids=lambda c: getattr(c, "__name__", None))
def test_equals_transformers_with_sums_of_whole_numbers(
    batched: Callable[[Tensor, Tensor], Tensor],
    reference: Callable[[float], LogitsProcessor],
    values: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on CUDA."""
    whole = processors.integer_cumsum
    monkeypatch.setattr(processors, "row_cumsum", whole)
    monkeypatch.setattr(processors, "row_nansum", lambda rows: whole(rows.nan_to_num(nan=0.0))[:, -1:])
    test_equals_transformers(batched, reference, values)


def test_sums_of_whole_numbers_have_no_order() -> None:
    """Of float64: those of float32 are added up in float64 on a CPU, which would hide it."""
    values = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = torch.randperm(5000)
    ends = [processors.integer_cumsum(part)[:, -1] for part in (values, values[:, order], values[1:2])]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0][1:2], ends[2])
    torch.testing.assert_close(ends[0], values.sum(-1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("penalty", [0.5, 1.2, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    before = scores(1)
    ids = torch.tensor([[4, 8, 8, 15, 16]])
    seen = torch.zeros(1, VOCAB_SIZE, dtype=torch.bool)
    seen[0, ids[0]] = True
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, before.clone())
    torch.testing.assert_close(processors.repetition_penalty(before, seen, torch.tensor([penalty])), expected)


def test_presence_counts_once_and_frequency_each_time() -> None:
    before = torch.zeros(1, 4)
    counts = torch.tensor([[0.0, 1.0, 3.0, 0.0]])
    after = processors.presence_and_frequency_penalty(before, counts, torch.tensor([0.5]), torch.tensor([0.25]))
    assert after.tolist() == [[0.0, -0.75, -1.25, 0.0]]


@pytest.mark.parametrize("process", [processors.top_p, processors.min_p, processors.typical_p])
def test_the_narrowest_setting_leaves_one_token(process: Callable[[Tensor, Tensor], Tensor]) -> None:
    narrowest: dict[Callable[[Tensor, Tensor], Tensor], float] = {
        processors.top_p: 0.0,
        processors.min_p: 1.0,
        processors.typical_p: 1e-9,
    }
    kept = torch.isfinite(process(scores(3)[2:], torch.tensor([narrowest[process]])))
    assert int(kept.sum()) == 1
