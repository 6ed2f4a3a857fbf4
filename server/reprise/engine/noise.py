"""Sampling without state: the noise of a draw is a hash of (seed, choice index, position, token id).

The same number comes out after a preemption, a restart or in another batch: integers alone until the last step, whose
wrapping products have one definition on every device. SplitMix64's finaliser (Steele, Lea and Flood 2014) absorbs one
word after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_MOST_DRAWN = (1 << 53) - 2
"""One more would be rounded to a number of 1, whose noise is infinite: a seed can be made that draws it."""


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(word: int) -> int:
    word &= _MASK
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)


def draw_key(seed: int, choice_index: int, position: int) -> int:
    """The key of one draw, signed 64 bit. `position` counts the generated tokens before it."""
    key = 0
    for word in (seed, choice_index, position):
        key = _mix((key ^ (word & _MASK)) + _GOLDEN)
    return _signed(key)


def uniform(keys: Tensor, size: int) -> Tensor:
    """[B] int64 keys to [B, size] float64 in the open interval (0, 1): one number for each token id."""
    word = keys[:, None] + torch.arange(1, size + 1, device=keys.device)[None, :] * _signed(_GOLDEN)
    word = (word ^ _shift_right(word, 30)) * _signed(_FIRST)
    word = (word ^ _shift_right(word, 27)) * _signed(_SECOND)
    word = word ^ _shift_right(word, 31)
    return (_shift_right(word, 11).clamp(max=_MOST_DRAWN).double() + 0.5) * 2.0**-53


def gumbel(keys: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise [B, size] float64: the argmax of scores plus this is a draw from their softmax."""
    return -torch.log(-torch.log(uniform(keys, size)))


def _shift_right(word: Tensor, bits: int) -> Tensor:
    """A logical shift, which torch has for unsigned words only."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)
