"""Choosing tokens natively, where scores are on the CPU."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reprise.engine.native.library import NativeContext, check_outcome
from reprise.engine.selection import Choice, Choices

_MASK = (1 << 64) - 1


class _ChoicesAtHand:
    """No tensor unless one is asked for: a step has driven torch out of the caches, so it takes as long as choosing."""

    def __init__(self, columns: array[int]) -> None:
        num_rows = len(columns) // 3
        self._columns = [columns[first : first + num_rows] for first in range(0, len(columns), num_rows)]

    @property
    def token_ids(self) -> Tensor:
        return torch.tensor(self._columns[0])

    def rows(self) -> list[Choice]:
        return list(map(Choice, *self._columns))


class NativeSelection:
    """Implements `selection.Selection`."""

    def __init__(self, context: NativeContext) -> None:
        self._context = context

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

    def top_p(self, scores: Tensor, p: list[float]) -> Tensor:
        scores = scores.contiguous()
        num_rows, size = scores.shape
        shares = np.array(p, dtype=np.float32)
        kept = torch.empty_like(scores)
        check_outcome(
            self._context.library.reprise_keep_top_p(
                self._context.handle, scores.data_ptr(), num_rows, size, shares.ctypes.data, kept.data_ptr()
            )
        )
        return kept
