"""Numbers of rows that products have, and that bits which follow them are found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reprise.engine.cuda import products
from reprise.engine.cuda.products import Products, choose_products, row_buckets, tiled


def test_buckets_double_and_then_grow_by_tiles() -> None:
    assert row_buckets(16, 300) == (16, 32, 64, 128, 256, 384)
    assert row_buckets(128, 5) == (128,)
    chosen = Products(row_buckets(16, 300))
    assert [chosen.num_rows(count) for count in (0, 1, 16, 17, 129, 384)] == [0, 16, 16, 32, 256, 384]


def test_tiles_compute_the_same_products() -> None:
    rows, weight = torch.randn(256, 24), torch.randn(40, 24)
    torch.testing.assert_close(tiled(256)(rows, weight), rows @ weight.T)
    assert tiled(256)(rows[:0], weight).shape == (0, 40)


@pytest.mark.parametrize(("fewest_rows", "expected"), [(0, 16), (17, 64), (65, 128)])
def test_the_smallest_buckets_whose_kernels_agree_are_taken(
    fewest_rows: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a library that has another kernel for few rows: its sums differ in their last bits."""

    def linear(rows: Tensor, weight: Tensor) -> Tensor:
        split = 11 if rows.shape[0] < fewest_rows else weight.shape[1]
        return nn.functional.linear(rows[:, :split], weight[:, :split]) + rows[:, split:] @ weight[:, split:].T

    monkeypatch.setattr(products, "F", type("Kernels", (), {"linear": staticmethod(linear)}))
    weights = [torch.randn(40, 64), torch.randn(32, 96)]
    chosen = choose_products(weights, 256)
    assert chosen.buckets[0] == expected
    assert chosen.tile is None


def test_where_no_buckets_agree_products_are_computed_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(rows: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(rows, weight) * (1 + rows.shape[0] * 1e-6)

    monkeypatch.setattr(products, "F", type("Kernels", (), {"linear": staticmethod(linear)}))
    chosen = choose_products([torch.randn(40, 64)], 256)
    assert chosen == tiled(256)
