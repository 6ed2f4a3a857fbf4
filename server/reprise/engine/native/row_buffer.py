"""Memory for one row a sequence that is used again from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_KEPT_ROWS = 256
"""More, as when a prompt is scored, are allocated for their step."""


class RowBuffer:
    """Rows of `width` numbers in float32: those of the last call are written over."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._kept = self._rows = torch.empty((0, width))

    def rows(self, count: int) -> Tensor:
        """[count, width]. Where the last call had as many, its very tensor: that takes no operation of torch."""
        if count == self._rows.shape[0]:
            return self._rows
        if count > MAX_KEPT_ROWS:
            return torch.empty((count, self._width))
        if count > self._kept.shape[0]:
            self._kept = torch.empty((count, self._width))
        self._rows = self._kept[:count]
        return self._rows
