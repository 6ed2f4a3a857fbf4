"""Matrix products that give a row the same bits however many rows are computed with it.

A library chooses its kernel by the number of rows, and kernels differ in their order of summation. So a step has one of
few numbers of rows, its bucket, and before a model is served every bucket's kernel is run over every weight's shape and
compared bit by bit with that of TILE rows, every place with a row from another one. The smallest buckets that agree are
used. A weight for which the largest do not is multiplied in tiles of as many rows as the largest one that does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
MAX_COMPARED = 1 << 28
_STRIDE = 37  # has no divisor with TILE
SMALLEST_BUCKETS = (16, 64, 128)
"""Of which the first that agrees is taken: with few rows reading the weights takes the time, not multiplying."""


@dataclass(frozen=True, slots=True)
class Products:
    """`buckets`: numbers of rows in ascending order. `tiles`: by the shape of a weight, rows that are computed with it
    at a time at most; with one of another shape all are.

    A tile is a bucket, and so is what it leaves of one.
    """

    buckets: tuple[int, ...]
    tiles: Mapping[torch.Size, int] = field(default_factory=dict)

    def __str__(self) -> str:
        tiles = [f"{rows} for {'x'.join(map(str, shape))}" for shape, rows in self.tiles.items()]
        return f"buckets from {self.buckets[0]} rows" + (f", tiles of {' and '.join(tiles)}" if tiles else "")

    def num_rows(self, needed: int) -> int:
        """The smallest bucket that holds so many rows; 0 for none."""
        return self.buckets[bisect_left(self.buckets, needed)] if needed else 0

    def __call__(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Of rows [R, inner] times weight [outer, inner]: [R, outer]. R is a bucket."""
        tile = self.tiles.get(weight.shape)
        if tile is None or rows.shape[0] <= tile:
            return F.linear(rows, weight)
        output = rows.new_empty((rows.shape[0], weight.shape[0]))
        for part, target in zip(torch.split(rows, tile), torch.split(output, tile), strict=True):
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


def without_order(_: Iterable[Tensor], largest: int) -> Products:
    """Those with the smallest buckets, where bits may follow the number of rows."""
    return Products(row_buckets(1, largest))


@torch.inference_mode()
def choose_products(weights: Iterable[Tensor], largest: int) -> Products:
    """Those with the smallest buckets, and for each shape the largest tiles, that give every row its bits.

    largest: rows of a step at most. Of a weight with many outer rows, buckets whose product would have more than
    MAX_COMPARED elements are not run.
    """
    tried = row_buckets(SMALLEST_BUCKETS[0], largest)
    agree = {
        shape: {bucket: _agrees(weight, bucket) for bucket in tried}
        for shape, weight in {weight.shape: weight for weight in weights}.items()
    }

    def agree_all(small: tuple[int, ...]) -> bool:
        return all(of_shape[bucket] for of_shape in agree.values() for bucket in small)

    smallest = next((size for size in SMALLEST_BUCKETS if agree_all(row_buckets(size, TILE))), TILE)
    buckets = row_buckets(smallest, largest)
    found = {shape: max(takewhile(of_shape.__getitem__, buckets), default=TILE) for shape, of_shape in agree.items()}
    return Products(buckets, {shape: tile for shape, tile in found.items() if tile != buckets[-1]})


def _agrees(weight: Tensor, bucket: int) -> bool:
    """Whether each of the bucket's places gives a row the bits that another place of TILE rows gives it."""
    if bucket * weight.shape[0] > MAX_COMPARED:
        return True
    generator = torch.Generator(weight.device).manual_seed(3)
    rows = torch.randn((TILE, weight.shape[1]), generator=generator, device=weight.device, dtype=weight.dtype)
    # So that TILE rows too are compared with those at other places.
    elsewhere = (torch.arange(bucket, device=weight.device) * _STRIDE + 1) % TILE
    return torch.equal(F.linear(rows[elsewhere], weight), F.linear(rows, weight)[elsewhere])


@dataclass(frozen=True, slots=True)
class BlasSettings:
    """What torch asks of CUDA's libraries for products, in the whole process."""

    library: Any
    bfloat16: tuple[bool, bool]
    """Whether parts of a sum may be added in it, and whether a sum may be spread over several parts of the device."""
    float16: tuple[bool, bool]

    @classmethod
    def now(cls) -> Self:
        matmul = torch.backends.cuda.matmul
        return cls(
            torch.backends.cuda.preferred_blas_library(),
            (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k),
            (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction_split_k),
        )

    @classmethod
    def of_one_order(cls) -> Self:
        """No sum in parts. cuBLASLt alone can be told so: through cuBLAS every product would be an error."""
        return cls("cublaslt", (False, False), (False, False))

    def apply(self) -> None:
        torch.backends.cuda.preferred_blas_library(self.library)
        matmul = torch.backends.cuda.matmul
        matmul.allow_bf16_reduced_precision_reduction = self.bfloat16
        matmul.allow_fp16_reduced_precision_reduction = self.float16
