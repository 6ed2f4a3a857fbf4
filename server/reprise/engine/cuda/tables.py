"""What a step computes, as one flat array of numbers that reaches the device in one copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

PADDING_TOKEN_ID = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """Rows of one sequence: these tokens, from position `start` on, with the blocks of all tokens up to the last."""

    token_ids: list[int]
    start: int
    block_ids: list[int]
    num_logit_rows: int = 1

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class TableShape:
    """How much a step's tables hold: rows, sequences, rows of logits, and blocks of one sequence."""

    num_rows: int
    num_sequences: int
    num_logit_rows: int
    num_blocks: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the members of StepTables, in their order."""
        rows, count = self.num_rows, self.num_sequences
        return (rows, rows, rows, count + 1, count + 1, count, self.num_logit_rows, count * self.num_blocks)


@dataclass(frozen=True, slots=True)
class StepTables:
    """Parts of one flat int32 tensor. R rows, B sequences, L rows of logits."""

    token_ids: Tensor
    """[R]"""
    positions: Tensor
    """[R]"""
    slots: Tensor
    """[R]: where a row's key and value go, block id · block size + offset in the block."""
    query_starts: Tensor
    """[B + 1]: the rows of sequence i begin at the i-th and end before the next. Rows behind the last are nobody's."""
    key_starts: Tensor
    """[B + 1]: sums of `num_keys`."""
    num_keys: Tensor
    """[B]: tokens of a sequence up to its last row."""
    logit_rows: Tensor
    """[L]"""
    block_table: Tensor
    """[B, blocks]"""

    @classmethod
    def over(cls, flat: Tensor, shape: TableShape) -> Self:
        """`flat`: int32, as long as the sizes of `shape` together."""
        token_ids, positions, slots, query_starts, key_starts, num_keys, logit_rows, table = torch.split(
            flat, list(shape.sizes)
        )
        block_table = table.view(shape.num_sequences, shape.num_blocks)
        return cls(token_ids, positions, slots, query_starts, key_starts, num_keys, logit_rows, block_table)


def write_tables(flat: Tensor, shape: TableShape, entries: list[Entry], *, block_size: int, padding_block: int) -> None:
    """Fill a step's tables on the host.

    Rows beyond those of the entries write their keys and values into `padding_block`, which no sequence has; sequences
    beyond them are one such row and one key. `flat` is as `StepTables.over` takes it.
    """
    tables = StepTables.over(flat, shape)
    token_ids, positions, slots = (part.numpy() for part in (tables.token_ids, tables.positions, tables.slots))
    query_starts, num_keys, table = (
        part.numpy() for part in (tables.query_starts, tables.num_keys, tables.block_table)
    )
    table[:] = padding_block
    row = 0
    logit_rows: list[int] = []
    for index, entry in enumerate(entries):
        end = row + len(entry.token_ids)
        token_ids[row:end] = entry.token_ids
        places = np.arange(entry.start, entry.end, dtype=np.int32)
        positions[row:end] = places
        blocks = np.array(entry.block_ids[: -(-entry.end // block_size)], dtype=np.int32)
        slots[row:end] = blocks[places // block_size] * block_size + places % block_size
        table[index, : len(blocks)] = blocks
        query_starts[index] = row
        num_keys[index] = entry.end
        logit_rows += range(end - entry.num_logit_rows, end)
        row = end
    token_ids[row:] = PADDING_TOKEN_ID
    positions[row:] = 0
    slots[row:] = padding_block * block_size
    num_padding = shape.num_sequences - len(entries)
    query_starts[len(entries) :] = np.arange(row, row + num_padding + 1)
    num_keys[len(entries) :] = 1
    key_starts = tables.key_starts.numpy()
    key_starts[0] = 0
    np.cumsum(num_keys, out=key_starts[1:])
    rows_of_logits = tables.logit_rows.numpy()
    rows_of_logits[: len(logit_rows)] = logit_rows
    rows_of_logits[len(logit_rows) :] = 0
