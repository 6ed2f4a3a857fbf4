"""Attention over pages: the plain one computes it, and the one of CUDA says to torch what torch understands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reprise.engine.cuda.attention import PAGE, VarlenAttention, plain_attention
from reprise.engine.cuda.tables import Entry, StepTables, TableShape, write_tables

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 4, 2, 8, 4, 12
ENTRIES = [Entry([5] * 3, 6, [3, 0, 7]), Entry([5], 4, [2, 9]), Entry([5] * 2, 0, [11])]


def make_tables(device: str = "cpu", block_size: int = BLOCK_SIZE) -> StepTables:
    shape = TableShape(num_rows=8, num_sequences=3, num_logit_rows=4, num_blocks=3)
    flat = torch.zeros(sum(shape.sizes), dtype=torch.int32)
    write_tables(flat, shape, ENTRIES, block_size=block_size, padding_block=NUM_BLOCKS)
    return StepTables.over(flat.to(device), shape)


def by_definition(query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Of the rows of ENTRIES, one after the other, in float64."""
    rows: list[Tensor] = []
    for entry in ENTRIES:
        slots = [entry.block_ids[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE for place in range(entry.end)]
        own_keys, own_values = (pages.flatten(0, 1)[slots].double() for pages in (keys, values))
        for place in range(entry.start, entry.end):
            first = 0 if window is None else max(0, place - window + 1)
            of_heads = []
            for head in range(HEADS):
                seen = own_keys[first : place + 1, head // (HEADS // KV_HEADS)]
                weights = (seen @ query[len(rows), head].double() * 0.3).softmax(0)
                of_heads.append(weights @ own_values[first : place + 1, head // (HEADS // KV_HEADS)])
            rows.append(torch.stack(of_heads))
    return torch.stack(rows).float()


@pytest.mark.parametrize("window", [None, 1, 3])
def test_the_plain_one_is_attention(window: int | None) -> None:
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(8, HEADS, HEAD_DIM, generator=generator)
    keys, values = torch.randn(2, NUM_BLOCKS + 1, BLOCK_SIZE, KV_HEADS, HEAD_DIM, generator=generator)
    found = plain_attention(query, keys, values, make_tables(), scale=0.3, window=window, max_queries=3)
    torch.testing.assert_close(found[:6], by_definition(query, keys, values, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("max_queries", [1, 3])
def test_the_one_of_cuda_is_called_as_torch_has_it(max_queries: int, window: int | None) -> None:
    """On tensors without values: its arguments, not what it computes, which takes a GPU."""
    query = torch.empty(8, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="meta")
    pages = torch.empty(NUM_BLOCKS + 1, PAGE, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="meta")
    attention = VarlenAttention(1024)
    tables = make_tables("meta", PAGE)
    found = attention(query, pages, pages, tables, scale=0.3, window=window, max_queries=max_queries)
    assert (found.shape, found.dtype) == (query.shape, torch.bfloat16)
