"""Choosing tokens natively, where scores are on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reprise.engine.native.library import NativeContext, check_outcome
from reprise.engine.selection import Highest

_MASK = (1 << 64) - 1


class NativeSelection:
    """Implements `selection.Selection`."""

    def __init__(self, context: NativeContext) -> None:
        self._context = context

    def highest(self, scores: Tensor) -> Highest:
        scores = scores.contiguous()
        num_rows, size = scores.shape
        token_ids = torch.empty(num_rows, dtype=torch.int32)
        values = torch.empty(num_rows)
        flags = torch.empty(num_rows, dtype=torch.uint8)
        self._context.library.reprise_highest(
            *(self._context.handle, scores.data_ptr(), num_rows, size),
            *(token_ids.data_ptr(), values.data_ptr(), flags.data_ptr()),
        )
        return Highest(token_ids.long(), values, flags.bool())

    def draw(self, scores: Tensor, keys: list[int]) -> Tensor:
        scores = scores.contiguous()
        num_rows, size = scores.shape
        words = np.array([key & _MASK for key in keys], dtype=np.uint64)
        token_ids = torch.empty(num_rows, dtype=torch.int32)
        check_outcome(
            self._context.library.reprise_draw(
                self._context.handle, scores.data_ptr(), num_rows, size, words.ctypes.data, token_ids.data_ptr()
            )
        )
        return token_ids.long()

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
