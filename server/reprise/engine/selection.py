"""The passes over all scores of a step that choosing a token takes, on whatever computes them fastest."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from reprise.engine import logits
from reprise.engine.device import to_device
from reprise.engine.noise import gumbel


class Highest(NamedTuple):
    """Of each row of scores [B, vocab]."""

    token_ids: Tensor
    """[B] int64: the first of the highest."""
    scores: Tensor
    """[B] float32: how high it is."""
    has_nan: Tensor
    """[B] bool."""


class Selection(Protocol):
    """All take scores [B, vocab] float32."""

    def highest(self, scores: Tensor) -> Highest: ...

    def draw(self, scores: Tensor, keys: list[int]) -> Tensor:
        """[B] int64: the tokens whose scores plus Gumbel noise are highest. `keys`: of `noise.draw_key`, one a row."""

    def top_p(self, scores: Tensor, p: list[float]) -> Tensor:
        """As `logits.top_p`, but for rounding where the probability that is left out is summed up."""


class TorchSelection:
    """On any device."""

    def highest(self, scores: Tensor) -> Highest:
        values, token_ids = scores.max(dim=-1)
        return Highest(token_ids, values, torch.isnan(scores).any(dim=-1))

    def draw(self, scores: Tensor, keys: list[int]) -> Tensor:
        noise = gumbel(to_device(keys, scores.device), scores.shape[-1])
        return (scores + noise).argmax(dim=-1)

    def top_p(self, scores: Tensor, p: list[float]) -> Tensor:
        return logits.top_p(scores, to_device(p, scores.device))
