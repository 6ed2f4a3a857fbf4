"""Choosing tokens natively, where scores are on the CPU."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from reprise.engine.native.library import NativeContext, Warp, check_outcome
from reprise.engine.native.row_buffer import RowBuffer
from reprise.engine.selection import Choice, Choices, typical_p
from reprise.types import SamplingParams

_MASK = (1 << 64) - 1


class _ChoicesAtHand:
    """No tensor unless one is asked for: a step has driven torch out of the caches, so it takes as long as choosing."""

    def __init__(self, columns: array[int]) -> None:
        num_rows = len(columns) // 3
        self._columns = [columns[column * num_rows : (column + 1) * num_rows] for column in range(3)]

    @property
    def token_ids(self) -> Tensor:
        return torch.tensor(self._columns[0])

    def rows(self) -> list[Choice]:
        return list(map(Choice, *self._columns))


class NativeSelection:
    """Implements `selection.Selection`."""

    def __init__(self, context: NativeContext) -> None:
        self._context = context
        self._warped: dict[int, RowBuffer] = {}
        """By vocabulary: a draft model may have another."""

    def choose(self, scores: Tensor, keys: Sequence[int | None]) -> Choices:
        scores = scores.contiguous()
        num_rows, size = scores.shape
        words = array("Q", [0 if key is None else key & _MASK for key in keys])
        draws = bytes([key is not None for key in keys])
        columns = array("q", bytes(3 * num_rows * 8))
        check_outcome(
            self._context.library.reprise_choose(
                *(self._context.handle, scores.data_ptr(), num_rows, size),
                *(words.buffer_info()[0], draws, columns.buffer_info()[0]),
            )
        )
        return _ChoicesAtHand(columns)

    def warp(self, scores: Tensor, parameters: Sequence[SamplingParams | None]) -> Tensor:
        """As torch's, but for rounding in the probabilities that `top_p` sums up and `min_p` compares."""
        scores = scores.contiguous()
        num_rows, size = scores.shape
        rows = (Warp * num_rows)(
            *(
                Warp(1.0, 0, 1.0, 0.0) if p is None else Warp(p.temperature, min(p.top_k, size), p.top_p, p.min_p)
                for p in parameters
            )
        )
        if size not in self._warped:
            self._warped[size] = RowBuffer(size)
        warped = self._warped[size].rows(num_rows)
        check_outcome(
            self._context.library.reprise_warp(
                self._context.handle, scores.data_ptr(), num_rows, size, rows, warped.data_ptr()
            )
        )
        return typical_p(warped, parameters)
