"""Native selection against torch's: the same tokens from the same scores and keys."""

from __future__ import annotations

import pytest
import torch

from reprise.engine.native.library import NativeContext, built_variants
from reprise.engine.native.selection import NativeSelection
from reprise.engine.noise import draw_key
from reprise.engine.selection import TorchSelection

SIZES = [1, 5, 16, 199, 16384, 16385, 40007]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_the_same_draws(size: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(7, size, generator=generator) * torch.tensor([[0.0], [0.1], [1], [2], [5], [20], [100]])
    scores[:, size // 3] = float("-inf") if size > 5 else 0.0
    native = NativeSelection(NativeContext(threads))
    for position in range(20 if size < 1000 else 4):
        keys = [None if row == position % 9 else draw_key(-3, row, position) for row in range(7)]
        assert native.choose(scores, keys).rows() == TorchSelection().choose(scores, keys).rows()


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


REMOVED = float("-inf")


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
    kept = NativeSelection(NativeContext(2, variant)).top_p(scores, shares)
    for row, p in enumerate(shares):
        different = (kept[row] != kept_by_definition(scores[row], p)).nonzero().flatten()
        # 1 - p is rounded to float32 and so are weights: at the border the last token may fall to either side.
        near = scores[row].double().softmax(-1)[different].sum()
        assert len(different) <= 1 or near < 2e-6, (row, different)
        removed = kept[row] == REMOVED
        assert torch.equal(kept[row][~removed], scores[row][~removed])
        assert not removed[scores[row].argmax()] or (scores[row] == scores[row].max()).sum() > 1


def test_of_equal_scores_top_p_removes_the_first() -> None:
    selection = NativeSelection(NativeContext(1))
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    kept = selection.top_p(scores, [0.5, 0.0, 0.0])
    assert kept.tolist() == [
        [REMOVED, REMOVED, 1.0, 1.0],
        [REMOVED, REMOVED, 2.0, REMOVED],
        [REMOVED, REMOVED, REMOVED, 5.0],
    ]
    assert kept.tolist() == TorchSelection().top_p(scores, [0.5, 0.0, 0.0]).tolist()


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_top_p_leaves_rows_without_a_sum_as_they_are(odd: float) -> None:
    scores = torch.zeros(3, 40)
    scores[0, 3] = odd
    scores[1] = REMOVED
    kept = NativeSelection(NativeContext(1)).top_p(scores, [0.5, 0.5, 0.5])
    assert torch.equal(kept[:2].nan_to_num(7.0), scores[:2].nan_to_num(7.0))
    assert (kept[2] == REMOVED).sum() == 20


def test_top_p_of_a_row_does_not_depend_on_its_company() -> None:
    scores = torch.randn(9, 5003, generator=torch.Generator().manual_seed(4))
    shares = [0.1 * row for row in range(1, 10)]
    together = NativeSelection(NativeContext(2)).top_p(scores, shares)
    for row in range(9):
        alone = NativeSelection(NativeContext(1)).top_p(scores[row : row + 1], shares[row : row + 1])
        assert torch.equal(alone[0], together[row])
