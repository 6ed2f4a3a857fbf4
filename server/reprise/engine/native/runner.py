"""The native decoder as a runner of the paged tier."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reprise.engine.native.decoder import BLOCK, NativeDecoder
from reprise.engine.native.library import Span, Step
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
        spans = (Span * len(batch))()
        token_ids: list[int] = []
        logit_rows: list[int] = []
        positions: list[np.ndarray] = []
        slots: list[np.ndarray] = []
        tables: list[np.ndarray] = []
        for scheduled, span in zip(batch, spans, strict=True):
            sequence, start, end = scheduled.sequence, scheduled.start, scheduled.start + scheduled.num_rows
            table = np.array(sequence.block_ids, dtype=np.int32)
            if len(self._parts) > 1:
                table = (table[:, None] * len(self._parts) + self._parts).reshape(-1)
            places = np.arange(start, end, dtype=np.int32)
            span.query_start, span.num_queries, span.num_tokens = len(token_ids), end - start, end
            span.blocks = table.ctypes.data
            token_ids += scheduled.token_ids
            logit_rows += range(len(token_ids) - scheduled.num_logit_rows, len(token_ids))
            positions.append(places)
            slots.append(table[places // BLOCK] * BLOCK + places % BLOCK)
            tables.append(table)
        decoder, logits = self._decoder, self._logits
        if min(token_ids) < 0 or max(token_ids) >= decoder.num_embeddings:
            raise IndexError("a token id is beyond the model's embeddings")
        assert max(int(part[-1]) for part in positions) < decoder.max_positions
        assert max(int(part.max()) for part in slots) < decoder.num_slots
        if logits.shape[0] < len(logit_rows):
            logits = torch.empty((len(logit_rows), decoder.vocab_size))
            if len(logit_rows) <= MAX_KEPT_ROWS:
                self._logits = logits
        arrays = [
            np.array(token_ids, dtype=np.int32),
            np.concatenate(positions),
            np.concatenate(slots).astype(np.int32, copy=False),
            np.array(logit_rows, dtype=np.int32),
        ]
        decoder.forward(
            Step(
                num_tokens=len(token_ids),
                num_spans=len(batch),
                num_logit_rows=len(logit_rows),
                token_ids=arrays[0].ctypes.data,
                positions=arrays[1].ctypes.data,
                slots=arrays[2].ctypes.data,
                spans=spans,
                logit_rows=arrays[3].ctypes.data,
                logits=logits.data_ptr(),
            )
        )
        return logits[: len(logit_rows)]

    def forget(self, sequence: Sequence) -> None:
        """Nothing to drop: the block pool has it all."""
