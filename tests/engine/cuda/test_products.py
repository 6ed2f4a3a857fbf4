"""Numbers of rows that products have, and that bits which follow them are found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reprise.engine.cuda import products
from reprise.engine.cuda.products import BlasSettings, Products, choose_products, row_buckets


@contextmanager
def counting_rows(computed: list[int]) -> Iterator[None]:
    """Adds the rows of each product."""

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.mm, nn.functional.linear):
                computed.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    with Counting():
        yield


def test_buckets_double_and_then_grow_by_tiles() -> None:
    assert row_buckets(16, 300) == (16, 32, 64, 128, 256, 384)
    assert row_buckets(128, 5) == (128,)
    chosen = Products(row_buckets(16, 300))
    assert [chosen.num_rows(count) for count in (0, 1, 16, 17, 129, 384)] == [0, 16, 16, 32, 256, 384]


@pytest.mark.parametrize("num_rows", [0, 64, 128, 256, 384, 512])
def test_tiles_compute_the_same_products(num_rows: int) -> None:
    rows, weight = torch.randn(num_rows, 24), torch.randn(40, 24)
    computed: list[int] = []
    products = Products(row_buckets(64, 512), {weight.shape: 256})
    with counting_rows(computed):
        found = products(rows, weight)
    torch.testing.assert_close(found, rows @ weight.T)
    assert max(computed) <= 256
    assert sum(computed) == num_rows


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
    assert chosen.tiles == {}


def test_where_no_buckets_agree_products_are_computed_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(rows: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(rows, weight) * (1 + rows.shape[0] * 1e-6)

    monkeypatch.setattr(products, "F", type("Kernels", (), {"linear": staticmethod(linear)}))
    chosen = choose_products([torch.randn(40, 64)], 256)
    assert chosen == Products((128, 256), {torch.Size((40, 64)): 128})
    assert str(chosen) == "buckets from 128 rows, tiles of 128 for 40x64"


@pytest.mark.parametrize(("most_rows", "tile"), [(128, 128), (300, 256), (400, 384), (600, None)])
def test_tiles_are_as_large_as_kernels_agree(most_rows: int, tile: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a library that has another kernel for many rows."""

    def linear(rows: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(rows, weight) * (1 if rows.shape[0] <= most_rows else 1 + 1e-6)

    monkeypatch.setattr(products, "F", type("Kernels", (), {"linear": staticmethod(linear)}))
    assert choose_products([torch.randn(40, 64)], 512).tiles.get(torch.Size((40, 64))) == tile


def test_a_weight_whose_kernels_do_not_agree_leaves_the_others_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(rows: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(rows, weight) * (1 + (rows.shape[0] > 128) * (weight.shape[0] == 32) * 1e-6)

    monkeypatch.setattr(products, "F", type("Kernels", (), {"linear": staticmethod(linear)}))
    whole, tiled = torch.randn(40, 64), torch.randn(32, 64)
    chosen = choose_products([whole, tiled], 256)
    assert chosen == Products((16, 32, 64, 128, 256), {tiled.shape: 128})
    computed: list[int] = []
    monkeypatch.undo()
    with counting_rows(computed):
        chosen(torch.randn(256, 64), whole)
        chosen(torch.randn(256, 64), tiled)
    assert computed == [256, 128, 128]


def test_a_kernel_that_is_another_at_some_places_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a part of the device that has what is left over: not among the last rows."""

    def linear(rows: Tensor, weight: Tensor) -> Tensor:
        found = nn.functional.linear(rows, weight)
        if rows.shape[0] == 512:
            found[200:210] *= 1 + 1e-6
        return found

    monkeypatch.setattr(products, "F", type("Kernels", (), {"linear": staticmethod(linear)}))
    assert choose_products([torch.randn(40, 64)], 512).tiles == {torch.Size((40, 64)): 384}


def test_a_place_whose_bits_are_its_own_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every bucket, so that places compared with themselves would agree."""

    def linear(rows: Tensor, weight: Tensor) -> Tensor:
        found = nn.functional.linear(rows, weight)
        found[100:101] *= 1 + 1e-6
        return found

    monkeypatch.setattr(products, "F", type("Kernels", (), {"linear": staticmethod(linear)}))
    assert choose_products([torch.randn(40, 64)], 512) == Products((128, 256, 384, 512), {torch.Size((40, 64)): 128})


def test_settings_of_one_order_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuBLASLt is asked for first: through cuBLAS a product of bfloat16 would be an error with them."""
    matmul = torch.backends.cuda.matmul
    asked: list[object] = []

    def library(name: object = None) -> object:
        if name is not None:
            asked.append((name, matmul.allow_bf16_reduced_precision_reduction_split_k))
        return "cublas"

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", library)
    before = BlasSettings.now()
    BlasSettings.of_one_order().apply()
    try:
        now = BlasSettings.now()
        assert now.bfloat16 == now.float16 == (False, False)
    finally:
        before.apply()
    assert BlasSettings.now() == before
    assert before.bfloat16 == before.float16 == (True, True)
    assert asked == [("cublaslt", True), ("cublas", False)]
