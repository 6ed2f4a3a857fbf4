"""Native selection against torch's: the same tokens from the same scores and keys."""

from __future__ import annotations

import pytest
import torch

from reprise.engine.native.library import NativeContext
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
        keys = [draw_key(-3, row, position) for row in range(7)]
        assert native.draw(scores, keys).tolist() == TorchSelection().draw(scores, keys).tolist()


@pytest.mark.parametrize("size", SIZES)
def test_the_same_highest(size: int) -> None:
    scores = torch.randn(6, size, generator=torch.Generator().manual_seed(1))
    scores[1, size // 2] = scores[1, -1] = 99.0
    scores[2, size // 2] = float("nan")
    scores[3] = float("-inf")
    scores[4, -1] = float("inf")
    scores[5, 0] = float("nan")
    found, expected = NativeSelection(NativeContext(2)).highest(scores), TorchSelection().highest(scores)
    assert found.has_nan.tolist() == expected.has_nan.tolist() == [False, False, True, False, False, True]
    for row in (0, 1, 3, 4):
        assert found.scores[row] == expected.scores[row]
        assert found.token_ids[row] == int((scores[row] == expected.scores[row]).nonzero()[0])
    assert ((found.token_ids >= 0) & (found.token_ids < size)).all()


def test_rows_that_are_not_contiguous() -> None:
    wide = torch.randn(4, 100, generator=torch.Generator().manual_seed(2))
    native = NativeSelection(NativeContext(1))
    assert native.highest(wide[:, 10:60]).token_ids.tolist() == wide[:, 10:60].argmax(-1).tolist()
