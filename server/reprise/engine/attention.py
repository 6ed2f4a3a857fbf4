"""Attention over the paged KV cache, registered as an attention function of transformers.

The models call it by name and know nothing of blocks. What the step is about reaches it through a module-level
context, since some models do not hand keyword arguments down to their attention.

A token's attention has the same bits however it is computed: alone or among others, in a chunk of any size, with any
number of tokens behind it. Rules that make it so:
 1. Every sequence is computed by itself over its own tokens, in float32.
 2. A sum over tokens runs over key blocks of `KEY_BLOCK` positions counted from the sequence's start: within a block by
    one kernel of one shape, then block by block. What a query does not see is an exact zero, and adding it changes
    nothing.
 3. Matrix products have a multiple of `ROW_MULTIPLE` rows: with others, kernels with another order of summation run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from reprise.engine.kv_cache import KVCache

ATTENTION_NAME = "reprise_paged"
HARMLESS_ARGUMENTS = frozenset(
    {"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}
    | {"return_dict", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
)
"""What models hand down that does not change what attention computes here."""
KEY_BLOCK = 128
ROW_MULTIPLE = 4
QUERY_TILE = 256
MAX_SCORES = 2**24
"""Queries that are computed together, and their scores over all heads, at most: memory, not values."""


class UnsupportedAttentionError(Exception):
    """A layer asks for something that paged attention does not express; the model belongs to the padded tier."""


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence of a packed step: its query rows, and the cache slots of all of its tokens up to now."""

    query_start: int
    num_queries: int
    slots: Tensor
    """[num_tokens] int64; the last `num_queries` are the tokens of this step."""


@dataclass(frozen=True, slots=True)
class KeyRange:
    """The keys of some queries of a span: whole key blocks, and which of them each query sees."""

    slots: Tensor
    """[num_keys] int64, a multiple of the key block; beyond the sequence's end its own first slot."""
    visible: Tensor
    """[num_queries, num_keys] bool."""


@dataclass(slots=True)
class AttentionStep:
    """What the attention function needs to know of the step under way."""

    cache: KVCache
    spans: list[SequenceSpan]
    new_slots: Tensor
    """[T] int64: where the step's own keys and values go."""
    fixed_order: bool = True
    """False: torch's own attention wherever it can express a layer, faster and with bits that follow its shapes."""
    calls: dict[nn.Module, int] = field(default_factory=dict)
    _ranges: dict[tuple[int, int, int, int | None, int], KeyRange] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Rows that belong to a sequence: the first ones."""
        return sum(span.num_queries for span in self.spans)

    def key_range(
        self, span_index: int, first_query: int, tile: int, sliding_window: int | None, key_block: int
    ) -> KeyRange:
        """For up to `tile` queries of a span from `first_query` on. The same for all layers of one window."""
        key = (span_index, first_query, tile, sliding_window, key_block)
        if key not in self._ranges:
            self._ranges[key] = _key_range(self.spans[span_index], first_query, tile, sliding_window, key_block)
        return self._ranges[key]


def _key_range(span: SequenceSpan, first_query: int, tile: int, sliding_window: int | None, key_block: int) -> KeyRange:
    num_tokens = span.slots.shape[0]
    start = num_tokens - span.num_queries + first_query
    end = min(start + tile, num_tokens)
    first_key = 0 if sliding_window is None else max(0, start - sliding_window + 1) // key_block * key_block
    num_keys = -(-(end - first_key) // key_block) * key_block
    slots = F.pad(span.slots[first_key:end], (0, num_keys - (end - first_key)))
    slots[end - first_key :] = span.slots[0]
    queries = torch.arange(start, end, device=slots.device)[:, None]
    keys = torch.arange(first_key, first_key + num_keys, device=slots.device)[None, :]
    visible = keys <= queries
    if sliding_window is not None:
        visible &= keys > queries - sliding_window
    return KeyRange(slots, visible)


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


def num_rows_of_sequences(num_rows: int) -> int:
    """How many of the `num_rows` of a packed forward belong to sequences: all, where no step is under way."""
    return num_rows if _current_step is None else min(num_rows, _current_step.num_tokens)


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
    **others: Any,
) -> tuple[Tensor, None]:
    """Write the step's keys and values into the cache, then attend over each sequence's tokens.

    query: [1, heads, T, key_dim], key: [1, kv_heads, T, key_dim], value: [1, kv_heads, T, value_dim].
    Returns [1, T, heads, value_dim]. `s_aux` [heads] are attention sinks: logits that take a share of the softmax
    and add nothing. Raises UnsupportedAttentionError.
    """
    step = _current_step
    if step is None:
        raise UnsupportedAttentionError("attention outside a step")
    unknown = [name for name, argument in others.items() if argument is not None and name not in HARMLESS_ARGUMENTS]
    if unknown:
        raise UnsupportedAttentionError(f"attention with {', '.join(sorted(unknown))}")
    if attention_mask is not None or is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedAttentionError("attention with a mask of its own")
    step.calls[module] = step.calls.get(module, 0) + 1
    new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    keys, values = step.cache.layer(module, new_keys, new_values, sliding_window)
    keys.index_copy_(0, step.new_slots, new_keys)
    values.index_copy_(0, step.new_slots, new_values)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    # Zeros, since the step may have padding rows that belong to no sequence.
    output = value.new_zeros((query.shape[2], num_heads, value.shape[3]))
    by_torch = not step.fixed_order and softcap is None and s_aux is None
    for index, span in enumerate(step.spans):
        tile = max(1, min(QUERY_TILE, MAX_SCORES // (num_heads * span.slots.shape[0])))
        for first_query in range(0, span.num_queries, tile):
            keys_of = step.key_range(index, first_query, tile, sliding_window, 1 if by_torch else KEY_BLOCK)
            start = span.query_start + first_query
            rows = slice(start, start + keys_of.visible.shape[0])
            function: Callable[..., Tensor] = attend_by_torch if by_torch else attend
            attended = function(
                query[0, :, rows].reshape(num_kv_heads, -1, keys_of.visible.shape[0], query.shape[-1]),
                keys.index_select(0, keys_of.slots).transpose(0, 1),
                values.index_select(0, keys_of.slots).transpose(0, 1),
                keys_of.visible,
                scale=scale,
                softcap=softcap,
                sinks=None if s_aux is None else s_aux.reshape(num_kv_heads, -1),
            )
            output[rows] = attended.flatten(0, 1).transpose(0, 1).to(value.dtype)
    return output[None], None


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax attention with one order of summation for every query, float32.

    query: [kv_heads, group, queries, key_dim], keys: [kv_heads, num_keys, key_dim], values: [.., value_dim],
    visible: [queries, num_keys] bool with one True in each row, sinks: [kv_heads, group]. `num_keys` is a multiple of
    KEY_BLOCK. Returns [kv_heads, group, queries, value_dim].
    """
    num_kv_heads, group, num_queries, key_dim = query.shape
    num_keys, num_rows = keys.shape[1], group * num_queries
    num_blocks = num_keys // KEY_BLOCK
    fill = (0, 0, 0, -num_rows % ROW_MULTIPLE)
    # The query heads of one key-value head become further rows of one product.
    rows = F.pad(query.float().reshape(num_kv_heads, num_rows, key_dim), fill)
    scores = torch.bmm(rows, keys.float().transpose(1, 2))[:, :num_rows] * scale
    scores = scores.reshape(num_kv_heads, group, num_queries, num_keys)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    highest = scores.amax(dim=-1, keepdim=True)
    if sinks is not None:
        sink = sinks.float()[:, :, None, None]
        highest = torch.maximum(highest, sink)
    weights = torch.exp(scores - highest)
    total = _sum_blocks(weights.reshape(*weights.shape[:3], num_blocks, KEY_BLOCK).sum(dim=-1), dim=-1)[..., None]
    if sinks is not None:
        total = total + torch.exp(sink - highest)
    by_block = F.pad(weights.reshape(num_kv_heads, num_rows, num_keys), fill)
    by_block = by_block.reshape(num_kv_heads, -1, num_blocks, KEY_BLOCK).transpose(1, 2)
    products = torch.bmm(
        by_block.reshape(num_kv_heads * num_blocks, -1, KEY_BLOCK),
        values.float().reshape(num_kv_heads * num_blocks, KEY_BLOCK, -1),
    )
    summed = _sum_blocks(products.reshape(num_kv_heads, num_blocks, *products.shape[1:]), dim=1)[:, :num_rows]
    return summed.reshape(num_kv_heads, group, num_queries, -1) / total


def attend_by_torch(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *, scale: float, **_: None) -> Tensor:
    """The same by torch's own routine, for layers without soft cap and sinks; any number of keys."""
    group = (-1, query.shape[1], -1, -1)
    return F.scaled_dot_product_attention(
        query,
        keys[:, None].expand(group),
        values[:, None].expand(group),
        # The one query of a decode step sees all of its keys: without a mask a faster kernel runs.
        attn_mask=visible if visible.shape[0] > 1 else None,
        scale=scale,
    )


def _sum_blocks(parts: Tensor, dim: int) -> Tensor:
    """The sum over `dim`, first to last: torch's own sum may regroup with the number of parts."""
    total = parts.select(dim, 0)
    for index in range(1, parts.shape[dim]):
        total = total + parts.select(dim, index)
    return total


AttentionInterface.register(ATTENTION_NAME, paged_attention)
