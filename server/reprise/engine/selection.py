"""The passes over all scores of a step that choosing a token takes, on whatever computes them fastest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from reprise.engine import logits
from reprise.engine.device import Fetch, to_device
from reprise.engine.noise import gumbel


class Choice(NamedTuple):
    """What was chosen from one row of scores."""

    token_id: int
    has_nan: int
    """1 where some of the scores are NaN; the token may then be any."""
    infinite: int
    """1 and -1 where the highest score is plus and minus infinity, else 0."""


class Choices(Protocol):
    """Of B rows, on their way to the host."""

    @property
    def token_ids(self) -> Tensor:
        """[B] int64, where the scores are."""

    def rows(self) -> list[Choice]:
        """Waits until they are there."""


class Selection(Protocol):
    """All take scores [B, vocab] float32."""

    def choose(self, scores: Tensor, keys: Sequence[int | None]) -> Choices:
        """A token of each row.

        keys: one a row, of `noise.draw_key`: the token whose score plus its Gumbel noise is highest. None: the first of
        the highest scores.
        """

    def top_p(self, scores: Tensor, p: list[float]) -> Tensor:
        """As `logits.top_p`, but for rounding where the probability that is left out is summed up."""


class _FetchedChoices:
    def __init__(self, token_ids: Tensor, has_nan: Tensor, infinite: Tensor) -> None:
        self.token_ids = token_ids
        self._fetch = Fetch([torch.stack([token_ids, has_nan, infinite])])

    def rows(self) -> list[Choice]:
        return list(map(Choice, *self._fetch.lists()[0]))


class TorchSelection:
    """On any device."""

    @torch.inference_mode()
    def choose(self, scores: Tensor, keys: Sequence[int | None]) -> Choices:
        highest, token_ids = scores.max(dim=-1)
        rows = [row for row, key in enumerate(keys) if key is not None]
        if rows:
            everything = len(rows) == len(keys)
            index = to_device(rows, scores.device)
            noise = gumbel(to_device([keys[row] for row in rows], scores.device), scores.shape[-1])
            drawn = ((scores if everything else scores[index]) + noise).argmax(dim=-1)
            token_ids = drawn if everything else token_ids.index_copy(0, index, drawn)
        infinite = torch.isposinf(highest).long() - torch.isneginf(highest).long()
        return _FetchedChoices(token_ids, torch.isnan(scores).any(dim=-1).long(), infinite)

    def top_p(self, scores: Tensor, p: list[float]) -> Tensor:
        return logits.top_p(scores, to_device(p, scores.device))
