"""The native decoder as a runner of the paged tier."""

from __future__ import annotations

from array import array

from torch import Tensor

from reprise.engine.native.decoder import BLOCK, NativeDecoder
from reprise.engine.native.library import Step
from reprise.engine.native.row_buffer import RowBuffer
from reprise.engine.scheduler import Batch
from reprise.engine.sequence import Sequence


class NativeRunner:
    """Implements `model_runner.ModelRunner`. `block_size`, the pool's, is a multiple of BLOCK."""

    def __init__(self, decoder: NativeDecoder, block_size: int) -> None:
        assert block_size % BLOCK == 0
        self._decoder = decoder
        self._block_size = block_size
        self._logits = RowBuffer(decoder.vocab_size)

    def run(self, batch: Batch) -> Tensor:
        """Logits [R, vocab] float32, valid until the next call."""
        token_ids = array("i")
        block_ids = array("i")
        spans = array("q")
        num_logit_rows = 0
        for scheduled in batch:
            count, needed, blocks = scheduled.num_rows, scheduled.num_logit_rows, scheduled.sequence.block_ids
            spans.extend((count, scheduled.start + count, needed, len(blocks)))
            token_ids.extend(scheduled.token_ids)
            block_ids.extend(blocks)
            num_logit_rows += needed
        logits = self._logits.rows(num_logit_rows)  # made before the step, which drives torch out of the caches
        self._decoder.forward(
            Step(
                num_spans=len(batch),
                block_size=self._block_size,
                spans=spans.buffer_info()[0],
                token_ids=token_ids.buffer_info()[0],
                block_ids=block_ids.buffer_info()[0],
                logits=logits.data_ptr(),
            )
        )
        return logits

    def forget(self, sequence: Sequence) -> None:
        """Nothing to drop: the block pool has it all."""
