"""Native selection against torch's: the same tokens from the same scores and keys."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from reprise.engine.native.library import NativeContext, built_variants
from reprise.engine.native.selection import NativeSelection
from reprise.engine.noise import draw_key
from reprise.engine.selection import Selection, TorchSelection
from reprise.types import SamplingParams

REMOVED = float("-inf")
SIZES = [1, 5, 16, 199, 16384, 16385, 40007]


@pytest.mark.parametrize("variant", built_variants())
@pytest.mark.parametrize("size", SIZES)
def test_the_same_draws(size: int, variant: str) -> None:
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(7, size, generator=generator) * torch.tensor([[0.0], [0.1], [1], [2], [5], [20], [100]])
    scores[:, size // 3] = float("-inf") if size > 5 else 0.0
    native = NativeSelection(NativeContext(2, variant))
    for position in range(20 if size < 1000 else 4):
        keys = [None if row == position % 9 else draw_key(-3, row, position) for row in range(7)]
        assert native.choose(scores, keys).rows() == TorchSelection().choose(scores, keys).rows()


@pytest.mark.parametrize("variant", built_variants())
@pytest.mark.parametrize("size", [4256, 4243], ids=["within", "behind the last sixteen"])
@pytest.mark.parametrize(("removed", "expected"), [(True, 7), (False, 4242)], ids=["removed", "kept"])
def test_a_seed_cannot_draw_a_token_that_is_removed(size: int, variant: str, removed: bool, expected: int) -> None:
    """This one has the largest number that there is for token 4242: it wins by 36 where it may."""
    scores = torch.full((1, size), REMOVED)
    scores[0, 7] = 30.0
    scores[0, 4242] = REMOVED if removed else 0.0
    keys = [draw_key(-3483434102947137779, 0, 0)]
    selections: list[Selection] = [TorchSelection(), NativeSelection(NativeContext(2, variant))]
    for selection in selections:
        assert selection.choose(scores, keys).rows()[0].token_id == expected


def odd_rows(size: int) -> torch.Tensor:
    """Rows in which the best so far is late, early, far ahead, or in none of the first blocks."""
    scores = torch.randn(8, size, generator=torch.Generator().manual_seed(size))
    scores[0] = torch.arange(size) * 0.01
    scores[1] = torch.arange(size, 0, -1) * 0.01
    scores[2, size // 2] = 30.0
    scores[3, : size // 2] = REMOVED
    scores[4] *= 1e6
    scores[5] = 0.0
    scores[6, size // 3 :] -= 25.0
    scores[7] = REMOVED
    scores[7, -1] = -5.0
    return scores


@pytest.mark.parametrize("variant", built_variants())
@pytest.mark.parametrize("size", SIZES)
def test_the_same_draws_of_odd_rows_and_whoever_is_beside_them(size: int, variant: str) -> None:
    scores = odd_rows(size)
    together, alone = (NativeSelection(NativeContext(threads, variant)) for threads in (2, 1))
    for position in range(20 if size < 1000 else 4):
        keys = [draw_key(5, row, position) for row in range(len(scores))]
        found = together.choose(scores, keys).rows()
        assert found == TorchSelection().choose(scores, keys).rows()
        assert found == [
            alone.choose(scores[row : row + 1], keys[row : row + 1]).rows()[0] for row in range(len(scores))
        ]


def test_no_rows_at_all() -> None:
    for selection in (NativeSelection(NativeContext(2)), TorchSelection()):
        assert selection.choose(torch.empty(0, 9), []).rows() == []


@pytest.mark.parametrize("size", SIZES)
def test_the_same_highest(size: int) -> None:
    scores = torch.randn(6, size, generator=torch.Generator().manual_seed(1))
    scores[1, size // 2] = scores[1, -1] = 99.0
    scores[2, size // 2] = float("nan")
    scores[3] = float("-inf")
    scores[4, -1] = float("inf")
    scores[5, 0] = float("nan")
    choices = NativeSelection(NativeContext(2)).choose(scores, [None] * 6)
    rows, expected = choices.rows(), TorchSelection().choose(scores, [None] * 6).rows()
    assert [row.has_nan for row in rows] == [row.has_nan for row in expected] == [0, 0, 1, 0, 0, 1]
    whole = [0, 1, 3, 4]
    assert [rows[i].infinite for i in whole] == [expected[i].infinite for i in whole] == [0, 0, -1, 1]
    for i in whole:
        assert rows[i].token_id == int((scores[i] == scores[i].max()).nonzero()[0])
    assert all(0 <= row.token_id < size for row in rows)
    assert choices.token_ids.tolist() == [row.token_id for row in rows]


def test_rows_that_are_not_contiguous() -> None:
    wide = torch.randn(4, 100, generator=torch.Generator().manual_seed(2))
    native = NativeSelection(NativeContext(1))
    assert native.choose(wide[:, 10:60], [None] * 4).token_ids.tolist() == wide[:, 10:60].argmax(-1).tolist()


def parameters(**values: Any) -> SamplingParams:
    return SamplingParams(seed=0, max_tokens=1, **values)


def only_top_p(selection: Selection, scores: torch.Tensor, shares: list[float]) -> torch.Tensor:
    return selection.warp(scores, [parameters(top_p=p) for p in shares]).clone()


def kept_by_definition(scores: torch.Tensor, p: float) -> torch.Tensor:
    """In float64, token by token."""
    probabilities = scores.double().softmax(-1)
    below, removed = 0.0, []
    for token in torch.sort(scores, stable=True).indices.tolist()[:-1]:
        below += float(probabilities[token])
        if below > 1 - p:
            break
        removed.append(token)
    kept = scores.clone()
    kept[removed] = REMOVED
    return kept


@pytest.mark.parametrize("variant", built_variants())
@pytest.mark.parametrize("size", [size for size in SIZES if size < 40000])
def test_top_p_keeps_what_the_definition_says(size: int, variant: str) -> None:
    generator = torch.Generator().manual_seed(size)
    spread = torch.tensor([[0.01], [0.5], [1], [3], [30], [200]])
    scores = (torch.randn(6, size, generator=generator) * spread).repeat(4, 1)
    scores[6:12, : size // 2] = REMOVED
    shares = [0.1, 0.5, 0.9, 0.95, 0.999, 0.3] * 2 + [1e-6] * 6 + [1 - 1e-6] * 6
    kept = only_top_p(NativeSelection(NativeContext(2, variant)), scores, shares)
    for row, p in enumerate(shares):
        different = (kept[row] != kept_by_definition(scores[row], p)).nonzero().flatten()
        # 1 - p is rounded to float32 and so are weights: at the border the last token may fall to either side.
        near = scores[row].double().softmax(-1)[different].sum()
        assert len(different) <= 1 or near < 2e-6, (row, different)
        removed = kept[row] == REMOVED
        assert torch.equal(kept[row][~removed], scores[row][~removed])
        assert not removed[scores[row].argmax()] or (scores[row] == scores[row].max()).sum() > 1


@pytest.mark.parametrize("variant", built_variants())
def test_top_p_of_scores_that_are_so_large_that_half_a_nat_is_lost(variant: str) -> None:
    """As at the lowest temperature that is none of 0."""
    scores = torch.full((5, 40), 60.0)
    scores[:, 3] = 84.0742035
    scores[:, 7:14] = torch.nextafter(scores[0, 3], torch.tensor(0.0))
    shares = [0.1, 0.3, 0.5, 0.6, 0.9]
    rows = [parameters(temperature=1e-5, top_p=p) for p in shares]
    expected = TorchSelection().warp(scores, rows)
    assert ((expected > REMOVED).sum(-1) > 1).any()
    assert torch.equal(NativeSelection(NativeContext(2, variant)).warp(scores, rows), expected)
    wide = 2.0**24 + torch.arange(40).repeat(5, 1) * 2.0
    rows = [parameters(top_p=p, top_k=k) for p, k in zip(shares, (0, 1, 2, 3, 40), strict=True)]
    assert torch.equal(NativeSelection(NativeContext(2, variant)).warp(wide, rows), TorchSelection().warp(wide, rows))


def test_no_memory_to_sort_in_is_an_error_and_passes() -> None:
    """Of the caller: what is thrown in a thread of the library would end the process."""
    scores = torch.zeros(2, 1 << 22)
    native = NativeSelection(NativeContext(2))
    native.warp(scores, [parameters(temperature=0.5)] * 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 24), hard))
    try:
        with pytest.raises(MemoryError):
            native.warp(scores, [parameters(top_p=0.5)] * 2)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert ((native.warp(scores, [parameters(top_p=0.5)] * 2) > REMOVED).sum(-1) == 1 << 21).all()


def test_parameters_beyond_what_a_request_may_ask_for() -> None:
    """As the defaults of a model are."""
    scores = spread_scores(50)
    for changes in ({"top_k": 2**32 + 1}, {"min_p": 1.5}):
        rows = [parameters(**changes)] * 5
        assert torch.equal(NativeSelection(NativeContext(1)).warp(scores, rows), TorchSelection().warp(scores, rows))


def test_of_equal_scores_top_p_removes_the_first() -> None:
    selection = NativeSelection(NativeContext(1))
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    kept = only_top_p(selection, scores, [0.5, 0.0, 0.0])
    assert kept.tolist() == [
        [REMOVED, REMOVED, 1.0, 1.0],
        [REMOVED, REMOVED, 2.0, REMOVED],
        [REMOVED, REMOVED, REMOVED, 5.0],
    ]
    assert kept.tolist() == only_top_p(TorchSelection(), scores, [0.5, 0.0, 0.0]).tolist()


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_rows_without_a_sum_stay_as_they_are(odd: float, native: bool) -> None:
    selection: Selection = NativeSelection(NativeContext(1)) if native else TorchSelection()
    scores = torch.zeros(3, 40)
    scores[0, 3] = odd
    scores[1] = REMOVED
    for changes in ({"top_p": 0.5}, {"temperature": 0.7}, {"top_k": 20}, {"min_p": 0.3}, {"typical_p": 0.5}):
        kept = selection.warp(scores, [parameters(**changes)] * 3)
        assert torch.equal(kept[:2].nan_to_num(7.0), scores[:2].nan_to_num(7.0))
    assert (selection.warp(scores, [parameters(top_p=0.5)] * 3)[2] == REMOVED).sum() == 20


def spread_scores(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(5, size, generator=generator) * torch.tensor([[0.01], [1], [5], [30], [200]])


@pytest.mark.parametrize("variant", built_variants())
@pytest.mark.parametrize("size", SIZES)
def test_temperature_and_top_k_are_torchs_bit_by_bit(size: int, variant: str) -> None:
    scores = spread_scores(size)
    scores[2] = scores[2].round()
    native = NativeSelection(NativeContext(2, variant))
    changed: list[dict[str, Any]] = [{"temperature": 0.7}, {"temperature": 1e-4}]
    changed += [{"top_k": k} for k in (1, 2, 17, size - 1, size + 1) if k > 0]
    for changes in changed:
        rows = [parameters(**changes), None] * 2 + [parameters(**changes)]
        assert torch.equal(native.warp(scores, rows), TorchSelection().warp(scores, rows)), changes


@pytest.mark.parametrize("variant", built_variants())
@pytest.mark.parametrize("size", SIZES)
def test_min_p_keeps_what_is_likely_enough(size: int, variant: str) -> None:
    scores = spread_scores(size)
    native = NativeSelection(NativeContext(2, variant))
    for ratio in (1e-9, 0.01, 0.5, 1.0):
        kept = native.warp(scores, [parameters(min_p=ratio)] * 5)
        share = (scores.double() - scores.double().amax(-1, keepdim=True)).exp()
        assert torch.equal(kept[share > ratio * (1 + 1e-5)], scores[share > ratio * (1 + 1e-5)])
        assert (kept[share < ratio * (1 - 1e-5)] == REMOVED).all()
        assert torch.equal(kept.amax(-1), scores.amax(-1))


@pytest.mark.parametrize("variant", built_variants())
def test_one_after_the_other_is_all_at_once(variant: str) -> None:
    native = NativeSelection(NativeContext(2, variant))
    steps: list[dict[str, Any]] = [
        {"temperature": 0.6},
        {"top_k": 50},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"typical_p": 0.8},
    ]
    for size in (5, 199, 5003):
        scores = expected = spread_scores(size)
        for step in steps:
            expected = native.warp(expected, [parameters(**step)] * 5).clone()
        changes = {name: value for step in steps for name, value in step.items()}
        assert torch.equal(native.warp(scores, [parameters(**changes)] * 5), expected)
        assert (expected == REMOVED).any()


def test_warped_rows_do_not_depend_on_their_company() -> None:
    scores = torch.randn(9, 5003, generator=torch.Generator().manual_seed(4))
    rows = [
        parameters(top_p=0.1 * row, temperature=0.2 * row, top_k=100 * row, min_p=0.01 * row) for row in range(1, 10)
    ]
    together = NativeSelection(NativeContext(2)).warp(scores, rows)
    for row in range(9):
        alone = NativeSelection(NativeContext(1)).warp(scores[row : row + 1], rows[row : row + 1])
        assert torch.equal(alone[0], together[row])
