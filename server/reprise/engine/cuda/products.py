"""Matrix products that give a row the same bits however many rows are computed with it.

A library chooses its kernel by the number of rows, and kernels differ in their order of summation. So a step has one of
few numbers of rows, its bucket, and before a model is served every bucket's kernel is run over every weight's shape and
compared bit by bit with the largest one's. The smallest buckets that agree are used. Where none do, every product is
computed in tiles of one number of rows, whose kernel is one kernel.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
MAX_COMPARED = 1 << 28
SMALLEST_BUCKETS = (16, 64, 128)
"""Of which the first that agrees is taken: with few rows reading the weights takes the time, not multiplying."""


@dataclass(frozen=True, slots=True)
class Products:
    """`buckets`: numbers of rows in ascending order. `tile`: rows that are computed at a time; None for all."""

    buckets: tuple[int, ...]
    tile: int | None = None

    def __str__(self) -> str:
        return f"tiles of {self.tile} rows" if self.tile else f"buckets from {self.buckets[0]} rows"

    def num_rows(self, needed: int) -> int:
        """The smallest bucket that holds so many rows; 0 for none."""
        return self.buckets[bisect_left(self.buckets, needed)] if needed else 0

    def __call__(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Of rows [R, inner] times weight [outer, inner]: [R, outer]. R is a bucket."""
        if self.tile is None or rows.shape[0] == self.tile:
            return F.linear(rows, weight)
        output = rows.new_empty((rows.shape[0], weight.shape[0]))
        for part, target in zip(torch.split(rows, self.tile), torch.split(output, self.tile), strict=True):
            torch.mm(part, weight.T, out=target)
        return output


def row_buckets(smallest: int, largest: int) -> tuple[int, ...]:
    """Doubling from `smallest` to TILE, then multiples of TILE up to the first that holds `largest`."""
    buckets = []
    size = smallest
    while size < TILE:
        buckets.append(size)
        size *= 2
    return (*buckets, *range(TILE, -(-max(largest, TILE) // TILE) * TILE + 1, TILE))


def tiled(largest: int) -> Products:
    return Products(row_buckets(TILE, largest), TILE)


def without_order(_: Iterable[Tensor], largest: int) -> Products:
    """Those with the smallest buckets, where bits may follow the number of rows."""
    return Products(row_buckets(1, largest))


@torch.inference_mode()
def choose_products(weights: Iterable[Tensor], largest: int) -> Products:
    """Those with the smallest buckets that give every row its bits, for steps of up to `largest` rows.

    Of a weight with many outer rows, buckets whose product would have more than MAX_COMPARED elements are not run.
    """
    shapes = {weight.shape: weight for weight in weights}
    for smallest in SMALLEST_BUCKETS:
        products = Products(row_buckets(smallest, largest))
        if all(_agree(weight, products.buckets) for weight in shapes.values()):
            return products
    return tiled(largest)


def _agree(weight: Tensor, buckets: Sequence[int]) -> bool:
    """Whether all buckets give the last rows the bits that the largest gives them."""
    generator = torch.Generator(weight.device).manual_seed(3)
    compared = [bucket for bucket in buckets if bucket * weight.shape[0] <= MAX_COMPARED] or buckets[:1]
    rows = torch.randn((compared[-1], weight.shape[1]), generator=generator, device=weight.device, dtype=weight.dtype)
    expected = F.linear(rows, weight)
    return all(torch.equal(F.linear(rows[-bucket:], weight), expected[-bucket:]) for bucket in compared)


def keep_to_one_order() -> None:
    """Ask cuBLAS not to spread a sum over several kernels' parts, nor to add them in a low precision."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    matmul.allow_fp16_reduced_precision_reduction = (False, False)
