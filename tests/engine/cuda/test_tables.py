"""A step's tables: what is where, and what fills up."""

from __future__ import annotations

import torch

from reprise.engine.cuda.tables import Entry, StepTables, TableShape, write_tables


def test_entries_and_what_fills_up() -> None:
    shape = TableShape(num_rows=8, num_sequences=4, num_logit_rows=4, num_blocks=3)
    flat = torch.full((sum(shape.sizes),), -1, dtype=torch.int32)
    entries = [Entry([7, 8, 9], 3, [5, 2, 6], num_logit_rows=2), Entry([4], 4, [1, 3])]
    write_tables(flat, shape, entries, block_size=4, padding_block=9)
    tables = StepTables.over(flat, shape)
    assert tables.token_ids.tolist() == [7, 8, 9, 4, 0, 0, 0, 0]
    assert tables.positions.tolist() == [3, 4, 5, 4, 0, 0, 0, 0]
    assert tables.slots.tolist() == [23, 8, 9, 12, 36, 36, 36, 36]
    assert tables.query_starts.tolist() == [0, 3, 4, 5, 6]
    assert tables.num_keys.tolist() == [6, 5, 1, 1]
    assert tables.key_starts.tolist() == [0, 6, 11, 12, 13]
    assert tables.logit_rows.tolist() == [1, 2, 3, 0]
    # Of a sequence's blocks, those that have tokens.
    assert tables.block_table.tolist() == [[5, 2, 9], [1, 3, 9], [9, 9, 9], [9, 9, 9]]
