"""Batched logits processors: rows [B, vocab] float32 and one parameter a row, equal to transformers' row by row.

Pure functions; each returns new scores. Removed tokens are -inf. The parameters are tensors [B] on the scores'
device. The equality with transformers' processors is proven by the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

REMOVED = float("-inf")
_UNITS = 2.0**48


def repetition_penalty(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive and multiply negative scores of `seen` tokens ([B, vocab] bool) by the penalty (> 0).

    Keskar et al. 2019, CTRL, equation in section 4.1.
    """
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def presence_and_frequency_penalty(scores: Tensor, counts: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """Subtract `presence` once and `frequency` for each occurrence; `counts` [B, vocab] of generated tokens."""
    return scores - frequency[:, None] * counts - presence[:, None] * (counts > 0)


def temperature(scores: Tensor, value: Tensor) -> Tensor:
    """Divide by the temperature (> 0)."""
    return scores / value[:, None]


def top_k(scores: Tensor, k: Tensor, largest: int | None = None) -> Tensor:
    """Keep the k highest scores (1 ≤ k), and whatever ties with the k-th. `largest` k: else it is fetched."""
    k = k.clamp(max=scores.shape[-1])
    most = int(k.max()) if largest is None else min(largest, scores.shape[-1])
    highest = torch.topk(scores, most, dim=-1).values
    threshold = highest.gather(-1, (k - 1)[:, None])
    return scores.masked_fill(scores < threshold, REMOVED)


def top_p(scores: Tensor, p: Tensor) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches p (0 ≤ p ≤ 1), at least one.

    Holtzman et al. 2019, nucleus sampling.
    """
    ascending, order = torch.sort(scores, dim=-1, descending=False, stable=True)
    cumulative = row_cumsum(ascending.softmax(dim=-1))
    remove = cumulative <= (1 - p)[:, None]
    remove[:, -1] = False
    return scores.masked_fill(remove.scatter(-1, order, remove), REMOVED)


def row_cumsum(values: Tensor) -> Tensor:
    """The sums of each row up to each column, whatever rows are beside it. The sums lie between -2^14 and 2^14.

    On CUDA they are added up as whole numbers: the order in which it adds floats follows the number of rows, and for
    one row it is not always the same.
    """
    if values.device.type != "cuda":
        return values.cumsum(dim=-1)
    return integer_cumsum(values)


def row_nansum(values: Tensor) -> Tensor:
    """The sum of each row [B, 1] but for what is no number, as `row_cumsum`."""
    if values.device.type != "cuda":
        return values.nansum(dim=-1, keepdim=True)
    return integer_cumsum(values.nan_to_num(nan=0.0))[:, -1:]


def integer_cumsum(values: Tensor) -> Tensor:
    """`row_cumsum` as multiples of 2^-48."""
    scaled = (values.double() * _UNITS).round().long()
    return (scaled.cumsum(dim=-1).double() / _UNITS).to(values.dtype)


def min_p(scores: Tensor, ratio: Tensor) -> Tensor:
    """Keep tokens with at least `ratio` (0 to 1) of the most likely one's probability. Nguyen et al. 2024."""
    probabilities = scores.softmax(dim=-1)
    threshold = ratio[:, None] * probabilities.max(dim=-1, keepdim=True).values
    remove = probabilities < threshold
    remove.scatter_(-1, scores.argmax(dim=-1, keepdim=True), value=False)
    return scores.masked_fill(remove, REMOVED)


def typical_p(scores: Tensor, mass: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, up to `mass` (0 < mass < 1) of probability.

    Meister et al. 2022, locally typical sampling.
    """
    logprobs = scores.log_softmax(dim=-1)
    entropy = -row_nansum(logprobs * logprobs.exp())
    distance = (-logprobs - entropy).abs()
    nearest, order = torch.sort(distance, dim=-1, descending=False, stable=True)
    cumulative = row_cumsum(scores.gather(-1, order).softmax(dim=-1))
    last = (cumulative < mass[:, None]).sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    remove = nearest > nearest.gather(-1, last)
    remove[:, 0] = False
    return scores.masked_fill(remove.scatter(-1, order, remove), REMOVED)
