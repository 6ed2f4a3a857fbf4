"""The keys and values of the paged tier: one pair of tensors for each attention layer, indexed by slot.

A slot holds one token: slot = block id · block size + offset in the block. The block pool decides who owns which.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer keeps for a token, and the window that it attends to (None: everything)."""

    num_key_value_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    sliding_window: int | None

    @property
    def bytes_per_token(self) -> int:
        return self.num_key_value_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class KVCache:
    """`num_slots` tokens for the layers named in `shapes`; a layer not named there is allocated when first seen.

    Each layer has keys [num_slots, num_key_value_heads, key_dim] and values [.., value_dim].
    """

    def __init__(self, num_slots: int, device: torch.device, shapes: dict[nn.Module, LayerShape] | None = None) -> None:
        self.num_slots = num_slots
        self.device = device
        self.shapes: dict[nn.Module, LayerShape] = {}
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for module, shape in (shapes or {}).items():
            self._allocate(module, shape)

    @property
    def padding_slot(self) -> int:
        """One slot more, which no block has: where the rows that fill up a step write."""
        return self.num_slots

    @property
    def bytes_per_token(self) -> int:
        return sum(shape.bytes_per_token for shape in self.shapes.values())

    @property
    def memory(self) -> list[Tensor]:
        """All keys and values."""
        return [tensor for pair in self._layers.values() for tensor in pair]

    def layer(self, module: nn.Module, key: Tensor, value: Tensor, sliding_window: int | None) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, by the attention module that owns it. `key`: [T, heads, dim]."""
        if module not in self._layers:
            shape = LayerShape(key.shape[1], key.shape[2], value.shape[2], key.dtype, sliding_window)
            self._allocate(module, shape)
        return self._layers[module]

    def _allocate(self, module: nn.Module, shape: LayerShape) -> None:
        # Zeros, since a masked-out NaN left in fresh memory would still poison a weighted sum.
        def zeros(dim: int) -> Tensor:
            size = (self.num_slots + 1, shape.num_key_value_heads, dim)
            return torch.zeros(size, dtype=shape.dtype, device=self.device)

        self.shapes[module] = shape
        self._layers[module] = (zeros(shape.key_dim), zeros(shape.value_dim))
