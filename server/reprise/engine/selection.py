"""The passes over all scores of a step that choosing a token takes, on whatever computes them fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from reprise.engine import logits
from reprise.engine.device import Fetch, to_device
from reprise.engine.noise import gumbel
from reprise.types import SamplingParams


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

    def warp(self, scores: Tensor, parameters: Sequence[SamplingParams | None]) -> Tensor:
        """What temperature, top_k, top_p, min_p and typical_p make of the scores, valid until the next call.

        parameters: one a row; None leaves it as it is. So stay rows that hold NaN or plus infinity, or nothing but
        minus infinity.
        """


_Warper = tuple[
    Callable[[SamplingParams], Any], Callable[[SamplingParams], bool], Callable[[Tensor, Tensor, list[Any]], Tensor]
]
"""A parameter, whether it is on, and what it makes of scores: by its values on the device, and on the host."""
_TYPICAL_P: _Warper = (lambda p: p.typical_p, lambda p: p.typical_p < 1.0, lambda s, v, _: logits.typical_p(s, v))
_WARPERS: tuple[_Warper, ...] = (
    (lambda p: p.temperature, lambda p: p.temperature != 1.0, lambda s, v, _: logits.temperature(s, v)),
    (lambda p: p.top_k, lambda p: p.top_k > 0, lambda s, v, values: logits.top_k(s, v, max(values))),
    (lambda p: p.top_p, lambda p: p.top_p < 1.0, lambda s, v, _: logits.top_p(s, v)),
    (lambda p: p.min_p, lambda p: p.min_p > 0.0, lambda s, v, _: logits.min_p(s, v)),
    _TYPICAL_P,
)


def is_warped(sampling: SamplingParams) -> bool:
    """Whether `Selection.warp` makes other scores of them at all."""
    return any(is_on(sampling) for _, is_on, _ in _WARPERS)


@torch.inference_mode()
def _warped(scores: Tensor, parameters: Sequence[SamplingParams | None], warpers: Iterable[_Warper]) -> Tensor:
    warped = scores
    for value, is_on, process in warpers:
        chosen = [(row, value(p)) for row, p in enumerate(parameters) if p is not None and is_on(p)]
        if chosen:
            values = [number for _, number in chosen]
            index = to_device([row for row, _ in chosen], scores.device)
            processed = process(warped[index], to_device(values, scores.device), values)
            warped = warped.index_copy(0, index, processed)
    if warped is scores:
        return scores
    are_numbers = torch.isfinite(scores.amax(dim=-1, keepdim=True)) & torch.isfinite(warped.amax(dim=-1, keepdim=True))
    return torch.where(are_numbers, warped, scores)


def typical_p(scores: Tensor, parameters: Sequence[SamplingParams | None]) -> Tensor:
    """The last of what `Selection.warp` does alone."""
    return _warped(scores, parameters, [_TYPICAL_P])


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

    def warp(self, scores: Tensor, parameters: Sequence[SamplingParams | None]) -> Tensor:
        return _warped(scores, parameters, _WARPERS)
