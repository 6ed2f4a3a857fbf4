"""Attention over the paged KV cache, registered as an attention function of transformers.

The models call it by name and know nothing of blocks. What the step is about reaches it through a module-level
context, since some models do not hand keyword arguments down to their attention. Every sequence is computed by
itself over its own tokens, so its result cannot depend on the others in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from reprise.engine.kv_cache import KVCache

ATTENTION_NAME = "reprise_paged"


class UnsupportedAttentionError(Exception):
    """A layer asks for something that paged attention does not express; the model belongs to the padded tier."""


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence of a packed step: its query rows, and the cache slots of all of its tokens up to now."""

    query_start: int
    num_queries: int
    slots: Tensor
    """[num_tokens] int64; the last `num_queries` are the tokens of this step."""


@dataclass(slots=True)
class AttentionStep:
    """What the attention function needs to know of the step under way."""

    cache: KVCache
    spans: list[SequenceSpan]
    new_slots: Tensor
    """[T] int64: where the step's own keys and values go."""
    calls: dict[nn.Module, int] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def mask(self, span_index: int, sliding_window: int | None) -> Tensor:
        """[num_queries, num_tokens] bool: which tokens each query sees. The same for every layer alike."""
        key = (span_index, sliding_window)
        if key not in self._masks:
            span = self.spans[span_index]
            num_tokens = span.slots.shape[0]
            positions = torch.arange(num_tokens, device=span.slots.device)
            query_positions = positions[num_tokens - span.num_queries :, None]
            visible = positions[None, :] <= query_positions
            if sliding_window is not None:
                visible &= positions[None, :] > query_positions - sliding_window
            self._masks[key] = visible
        return self._masks[key]


_current_step: AttentionStep | None = None


@contextmanager
def attention_step(step: AttentionStep) -> Iterator[None]:
    """Make `step` the one that attention calls belong to. Not re-entrant: an engine runs one forward at a time."""
    global _current_step  # noqa: PLW0603 # keyword arguments do not reach every model's attention
    assert _current_step is None
    _current_step = step
    try:
        yield
    finally:
        _current_step = None


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write the step's keys and values into the cache, then attend over each sequence's tokens.

    query: [1, heads, T, key_dim], key: [1, kv_heads, T, key_dim], value: [1, kv_heads, T, value_dim].
    Returns [1, T, heads, value_dim]. `s_aux` [heads] are attention sinks: logits that take a share of the softmax
    and add nothing. Raises UnsupportedAttentionError.
    """
    step = _current_step
    if step is None:
        raise UnsupportedAttentionError("attention outside a step")
    if attention_mask is not None or is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedAttentionError("attention with a mask of its own")
    step.calls[module] = step.calls.get(module, 0) + 1
    new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    keys, values = step.cache.layer(module, new_keys, new_values, sliding_window)
    keys.index_copy_(0, step.new_slots, new_keys)
    values.index_copy_(0, step.new_slots, new_values)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    output = torch.empty((query.shape[2], num_heads, value.shape[3]), dtype=value.dtype, device=value.device)
    for index, span in enumerate(step.spans):
        rows = slice(span.query_start, span.query_start + span.num_queries)
        slots, mask = span.slots, None
        if span.num_queries > 1:
            mask = step.mask(index, sliding_window).repeat(num_heads // num_kv_heads, 1)
        elif sliding_window is not None:
            slots = slots[-sliding_window:]
        # Query heads of one key-value head become further query rows: [kv_heads, group · queries, dim].
        grouped = query[0, :, rows].reshape(num_kv_heads, -1, query.shape[-1])
        attended = _attend(
            grouped,
            keys.index_select(0, slots).transpose(0, 1),
            values.index_select(0, slots).transpose(0, 1),
            mask=mask,
            scale=scale,
            softcap=softcap,
            sinks=None if s_aux is None else s_aux.reshape(num_kv_heads, -1),
        )
        output[rows] = attended.reshape(num_heads, span.num_queries, -1).transpose(0, 1)
    return output[None], None


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[kv_heads, rows, dim] over [kv_heads, tokens, dim]; `sinks`: [kv_heads, group], rows ordered by group."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=mask, scale=scale)[0]
    scores = torch.matmul(query, keys.transpose(1, 2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        rows_per_head = query.shape[1] // sinks.shape[1]
        column = sinks.float().repeat_interleave(rows_per_head, dim=1)[..., None]
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(weights.to(values.dtype), values)


AttentionInterface.register(ATTENTION_NAME, paged_attention)
