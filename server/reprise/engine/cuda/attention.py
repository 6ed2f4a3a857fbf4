"""Attention over pages of keys and values, with one order of summation for every token.

On CUDA it is `torch.nn.attention.varlen`, told not to split the keys of a sequence: its kernel for pages then sums over
key blocks of one size counted from the sequence's start, whatever else is in the batch. That one takes pages of a
multiple of 256 tokens in bfloat16 and float16. The other one here is for everything else, and for tests: slower,
plain torch, with the rules of `engine.attention`.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from reprise.engine.attention import KEY_BLOCK, QUERY_TILE, attend
from reprise.engine.cuda.tables import StepTables

PAGE = 256
"""Tokens of a page that torch's kernel takes, or a multiple of it."""


class PagedAttention(Protocol):
    """Causal attention of a step's rows over the keys and values of their sequences."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: StepTables,
        *,
        scale: float,
        window: int | None,
        max_queries: int,
    ) -> Tensor:
        """query: [R, heads, head_dim], keys and values: [blocks, block size, kv_heads, head_dim].

        `window`: how many tokens a row sees, itself among them; None for all. `max_queries`: rows of a
        sequence at most; with 1 each has one, and there are no others. Returns [R, heads, head_dim]; what nobody's rows
        get is not defined.
        """


class VarlenAttention:
    """Implements PagedAttention on CUDA. `max_keys`: of any sequence."""

    def __init__(self, max_keys: int) -> None:
        self._max_keys = max_keys

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: StepTables,
        *,
        scale: float,
        window: int | None,
        max_queries: int,
    ) -> Tensor:
        sees_all = max_queries == 1 and window is None
        attended = varlen_attn(
            query,
            keys,
            values,
            tables.query_starts,
            tables.key_starts,
            max_queries,
            self._max_keys,
            scale=scale,
            # The last token sees everything in any case; said so, the heads of a group share one read of the keys.
            window_size=(-1, -1) if sees_all else (-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=tables.num_keys,
            block_table=tables.block_table,
            # Else the keys are split by how busy the batch keeps the device, and with pages the parts of all
            # sequences are put together in the first one's place (pytorch #194167).
            num_splits=1,
        )
        assert isinstance(attended, Tensor)
        return attended


def plain_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: StepTables,
    *,
    scale: float,
    window: int | None,
    max_queries: int,  # noqa: ARG001 # of the interface
) -> Tensor:
    """Implements PagedAttention on any device, in float32. Asks the host for each sequence's place."""
    num_heads, num_kv_heads, head_dim = query.shape[1], keys.shape[2], query.shape[2]
    output = torch.zeros_like(query)
    starts, lengths = tables.query_starts.tolist(), tables.num_keys.tolist()
    for index, num_keys in enumerate(lengths):
        blocks = tables.block_table[index, : -(-num_keys // keys.shape[1])].long()
        fill = (0, 0, 0, 0, 0, -num_keys % KEY_BLOCK)
        of_sequence, values_of_sequence = (
            F.pad(pages[blocks].flatten(0, 1)[:num_keys], fill).transpose(0, 1) for pages in (keys, values)
        )
        places = torch.arange(of_sequence.shape[1], device=query.device)
        first_row, last_row = starts[index], starts[index + 1]
        for row in range(first_row, last_row, QUERY_TILE):
            rows = query[row : min(row + QUERY_TILE, last_row)]
            # The last row is the last key.
            position = num_keys - (last_row - row)
            own = torch.arange(position, position + rows.shape[0], device=query.device)
            visible = places[None, :] <= own[:, None]
            if window is not None:
                visible &= places[None, :] > own[:, None] - window
            attended = attend(
                rows.reshape(-1, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(1, 2, 0, 3),
                of_sequence,
                values_of_sequence,
                visible,
                scale=scale,
                softcap=None,
                sinks=None,
            )
            output[row : row + rows.shape[0]] = attended.flatten(0, 1).transpose(0, 1).to(query.dtype)
    return output
