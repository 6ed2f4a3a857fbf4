"""The native decoder as a runner of the paged tier."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reprise.engine.native.decoder import BLOCK, NativeDecoder
from reprise.engine.native.library import Step
from reprise.engine.scheduler import Batch
from reprise.engine.sequence import Sequence

MAX_KEPT_ROWS = 256
"""Of logits, from step to step: more, as when a prompt is scored, are allocated for their step."""


class NativeRunner:
    """Implements `model_runner.ModelRunner`. `block_size`, the pool's, is a multiple of BLOCK."""

    def __init__(self, decoder: NativeDecoder, block_size: int) -> None:
        assert block_size % BLOCK == 0
        self._decoder = decoder
        self._block_size = block_size
        self._parts = np.arange(block_size // BLOCK, dtype=np.int32)
        self._logits = torch.empty((0, decoder.vocab_size))

    def run(self, batch: Batch) -> Tensor:
        """Logits [R, vocab] float32, valid until the next call."""
        token_ids: list[int] = []
        positions: list[int] = []
        logit_rows: list[int] = []
        block_ids: list[int] = []
        shapes: list[tuple[int, int, int, int]] = []
        for scheduled in batch:
            first, start, count = len(token_ids), scheduled.start, scheduled.num_rows
            shapes.append((first, count, start + count, len(block_ids)))
            token_ids += scheduled.token_ids
            positions += range(start, start + count)
            logit_rows += range(first + count - scheduled.num_logit_rows, first + count)
            block_ids += scheduled.sequence.block_ids
        parts = len(self._parts)
        table = np.array(block_ids, dtype=np.int32)
        if parts > 1:
            table = (table[:, None] * parts + self._parts).reshape(-1)
        spans = np.array(shapes, dtype=np.int64)
        first_blocks = spans[:, 3] * parts
        rows = np.array([token_ids, positions], dtype=np.int32)
        blocks = np.repeat(first_blocks, spans[:, 1]) + rows[1] // BLOCK
        slots = table[blocks] * BLOCK + rows[1] % BLOCK
        spans[:, 3] = table.ctypes.data + first_blocks * table.itemsize
        decoder, logits = self._decoder, self._logits
        if rows[0].min() < 0 or rows[0].max() >= decoder.num_embeddings:
            raise IndexError("a token id is beyond the model's embeddings")
        assert rows[1].max() < decoder.max_positions
        assert slots.max() < decoder.num_slots
        if logits.shape[0] < len(logit_rows):
            logits = torch.empty((len(logit_rows), decoder.vocab_size))
            if len(logit_rows) <= MAX_KEPT_ROWS:
                self._logits = logits
        needed = np.array(logit_rows, dtype=np.int32)
        decoder.forward(
            Step(
                num_tokens=len(token_ids),
                num_spans=len(batch),
                num_logit_rows=len(logit_rows),
                token_ids=rows[0].ctypes.data,
                positions=rows[1].ctypes.data,
                slots=slots.ctypes.data,
                spans=spans.ctypes.data,
                logit_rows=needed.ctypes.data,
                logits=logits.data_ptr(),
            )
        )
        return logits[: len(logit_rows)]

    def forget(self, sequence: Sequence) -> None:
        """Nothing to drop: the block pool has it all."""
