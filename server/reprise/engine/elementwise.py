"""Elementwise functions whose result has the same bits wherever in a tensor an element stands.

Torch's sigmoid, SiLU, GELU, softplus and Mish compute most of a tensor in vectors and what is left over, at its end and
at the end of each thread's share, with another exponential. Which elements those are follows the number of rows. Here
they are made of functions that have one way for all elements (`exp`, `tanh`, `erf`, `log1p`) and of exact arithmetic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_torch_rsqrt = torch.rsqrt


def sigmoid(input: Tensor) -> Tensor:  # noqa: A002 # torch's own names of arguments, here and below
    return torch.exp(-input.float()).add_(1.0).reciprocal_().to(input.dtype)


def silu(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002, ARG001, FBT001, FBT002 # as above
    wide = input.float()
    return (wide / torch.exp(-wide).add_(1.0)).to(input.dtype)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:  # noqa: A002 # as above
    wide = input.float()
    if approximate == "none":
        share = torch.erf(wide * math.sqrt(0.5))
    else:
        share = torch.tanh(math.sqrt(2.0 / math.pi) * (wide + 0.044715 * (wide * wide * wide)))
    return (0.5 * wide * (1.0 + share)).to(input.dtype)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:  # noqa: A002 # as above
    wide = input.float() * beta
    return (torch.where(wide > threshold, wide, torch.log1p(torch.exp(wide))) / beta).to(input.dtype)


def mish(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002, ARG001, FBT001, FBT002 # as above
    wide = input.float()
    return (wide * torch.tanh(softplus(wide))).to(input.dtype)


def rsqrt(input: Tensor) -> Tensor:  # noqa: A002 # as above
    """Exact in float32 everywhere; in low precision torch rounds once or twice."""
    return _torch_rsqrt(input.float()).to(input.dtype)


_REPLACED: tuple[tuple[Any, str, Callable[..., Tensor]], ...] = (
    (F, "silu", silu),
    (F, "gelu", gelu),
    (F, "softplus", softplus),
    (F, "mish", mish),
    (F, "sigmoid", sigmoid),
    (torch, "sigmoid", sigmoid),
    (torch, "rsqrt", rsqrt),
    (Tensor, "sigmoid", sigmoid),
    (Tensor, "rsqrt", rsqrt),
)


@contextmanager
def fixed_elementwise() -> Iterator[None]:
    """Within it the models' code calls the functions above by torch's names. One forward at a time.

    Replaced by name, since a mode that torch asks at each of its calls made a step far slower.
    """
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _REPLACED]
    try:
        for owner, name, function in _REPLACED:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def bind_late(model: nn.Module) -> None:
    """Let activations that hold one of torch's functions look it up by name at each call instead."""
    for module in model.modules():
        held = getattr(module, "act", None)
        function, keywords = (held.func, held.keywords) if isinstance(held, functools.partial) else (held, {})
        name = next((name for name in ("gelu", "mish", "silu") if function is getattr(F, name)), None)
        if name is not None:
            setattr(module, "act", functools.partial(_by_name, name, **keywords))  # noqa: B010 # of a class that we do not know


def _by_name(name: str, input: Tensor, **keywords: Any) -> Tensor:  # noqa: A002 # as above
    result: Tensor = getattr(F, name)(input, **keywords)
    return result
