"""The decoder as a runner of the paged tier: graphs for decode steps, and the next step begun ahead of its time.

A step of one row for each sequence is padded to a bucket. On CUDA each bucket's forward was captured as a graph, and
one copy of the step's tables and one launch run it. Everything else is run operation by operation.

When a step's tokens are chosen on the device, the step after it is known but for sequences that end or arrive: each
sequence has one more token, at one more place. `anticipate` gives it to the device before the host knows the tokens,
so that the device computes while the host takes in what was chosen. A row that is not asked for then has cost nothing
but its place, and what it wrote lies at places that only its sequence owned, where later steps write before they read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reprise.engine.cuda.decoder import CudaDecoder
from reprise.engine.cuda.tables import Entry, StepTables, TableShape, write_tables
from reprise.engine.device import to_device
from reprise.engine.scheduler import Batch, ScheduledSequence
from reprise.engine.sequence import Sequence

_NUM_WARM_UPS = 2
STEPS_NOT_BEGUN = 16
"""After a step that was begun for sequences which then asked for another, as where drafts come: it cost its time."""


@dataclass(frozen=True, slots=True)
class Capture:
    """Where a runner's graphs are captured.

    `stream` is the runner's own: a library's workspace belongs to a stream and goes with the first graph of it that is
    dropped, under the graphs of other runners too where torch's own stream for captures is used (pytorch #193402).
    """

    pool: Any
    """torch's handle of the memory that they share."""
    stream: Any


class DecodeGraph:
    """The forward of a bucket of sequences with one row each, over tables that stay in one place.

    On CUDA it is captured when it is made, where a `capture` says; elsewhere, without one, it is called.
    """

    def __init__(self, decoder: CudaDecoder, bucket: int, num_blocks: int, capture: Capture | None) -> None:
        self._decoder = decoder
        self.shape = TableShape(bucket, bucket, bucket, num_blocks)
        host = torch.empty(sum(self.shape.sizes), dtype=torch.int32)
        write_tables(host, self.shape, [], block_size=decoder.block_size, padding_block=decoder.num_blocks)
        self.flat = host.to(decoder.device)
        self.tables = StepTables.over(self.flat, self.shape)
        self._graph: torch.cuda.CUDAGraph | None = None
        if capture is not None:
            capture.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(capture.stream):
                for _ in range(_NUM_WARM_UPS):
                    self._forward()
            torch.cuda.current_stream().wait_stream(capture.stream)
            self._graph = torch.cuda.CUDAGraph()
            # A capture that fails leaves its stream the current one.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(self._graph, pool=capture.pool, stream=capture.stream),
            ):
                self._logits = self._forward()

    def run(self) -> Tensor:
        """Logits [bucket, vocab] of what `tables` hold; on CUDA valid until the next run of any graph's pool."""
        if self._graph is None:
            return self._forward()
        self._graph.replay()
        return self._logits

    def _forward(self) -> Tensor:
        return self._decoder.forward(self.tables, max_queries=1)


@dataclass(frozen=True, slots=True)
class Anticipated:
    """A step that was given to the device: the row of each sequence, and what it takes for granted."""

    entries: dict[int, tuple[int, Entry]]
    """By sequence id; the token ids are not known."""
    logits: Tensor

    def row(self, scheduled: ScheduledSequence) -> int | None:
        """The row that is what was scheduled; None where there is none."""
        row, entry = self.entries.get(scheduled.sequence.sequence_id, (0, None))
        if entry is None or not _has_one_row(scheduled) or scheduled.start != entry.start:
            return None
        return row if scheduled.sequence.block_ids == entry.block_ids else None


class CudaRunner:
    """Implements `model_runner.ModelRunner` and `model_runner.Anticipating`. `block_size` is the decoder's."""

    def __init__(self, decoder: CudaDecoder, max_num_seqs: int) -> None:
        self._decoder = decoder
        self._device = decoder.device
        self._max_blocks = -(-decoder.max_positions // decoder.block_size)
        largest = decoder.products.num_rows(max_num_seqs)
        buckets = [bucket for bucket in decoder.products.buckets if bucket <= largest]
        capture = None
        if self._device.type == "cuda" and buckets:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            capture = Capture(torch.cuda.graph_pool_handle(), stream)
        # The largest first: the others find room in its memory.
        graphs = [DecodeGraph(decoder, bucket, self._max_blocks, capture) for bucket in reversed(buckets)]
        self._graphs = {graph.shape.num_rows: graph for graph in graphs}
        self._max_num_seqs = max_num_seqs
        self._anticipated: Anticipated | None = None
        self._num_to_wait = 0
        self.num_anticipated_rows = 0
        """Rows that were asked for after they had been given to the device."""

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Logits [R, vocab] in the model's number format, valid until the next call."""
        anticipated, self._anticipated = self._anticipated, None
        rows = [None if anticipated is None else anticipated.row(scheduled) for scheduled in batch]
        rest = [scheduled for scheduled, row in zip(batch, rows, strict=True) if row is None]
        known = [row for row in rows if row is not None]
        self.num_anticipated_rows += len(known)
        if anticipated is None or not known:
            if anticipated is not None and any(one.sequence.sequence_id in anticipated.entries for one in batch):
                self._num_to_wait = STEPS_NOT_BEGUN
            return self._compute(rest)
        if not rest and known == list(range(len(known))):
            return anticipated.logits[: len(known)]
        # Taken out first: the rest may write over them.
        of_known = anticipated.logits.index_select(0, to_device(known, self._device))
        if not rest:
            return of_known
        counts = [scheduled.num_logit_rows for scheduled in rest]
        of_rest = iter(torch.split(self._compute(rest), counts))
        ahead = iter(torch.split(of_known, 1))
        return torch.cat([next(of_rest) if row is None else next(ahead) for row in rows])

    @torch.inference_mode()
    def anticipate(self, batch: Batch, token_ids: Tensor) -> None:
        """Begin the step after `batch`, whose sequences were given these tokens [len(batch)] int64 on the device.

        Does nothing where the next step is not the same for most: with prompts, drafts, or a block that is not there.
        """
        if token_ids.shape[0] != len(batch) or not all(map(_can_go_on, batch)):
            return
        if self._num_to_wait:
            self._num_to_wait -= 1
            return
        entries: dict[int, tuple[int, Entry]] = {}
        rows: list[int] = []
        for row, scheduled in enumerate(batch):
            sequence = scheduled.sequence
            if sequence.num_output_tokens + 1 >= sequence.sampling.max_tokens:
                continue
            if sequence.num_tokens >= len(sequence.block_ids) * self._decoder.block_size:
                return
            entries[sequence.sequence_id] = len(rows), Entry([0], sequence.num_tokens, sequence.block_ids[:])
            rows.append(row)
        if not rows:
            return
        chosen = token_ids if len(rows) == len(batch) else token_ids.index_select(0, to_device(rows, self._device))
        logits = self._decode([entry for _, entry in entries.values()], chosen)
        self._anticipated = Anticipated(entries, logits)

    def forget(self, sequence: Sequence) -> None:
        """Nothing to drop: the block pool has it all."""

    def _compute(self, batch: Batch) -> Tensor:
        entries = [_entry(scheduled) for scheduled in batch]
        for entry in entries:
            if min(entry.token_ids) < 0 or max(entry.token_ids) >= self._decoder.num_embeddings:
                raise IndexError("a token id is beyond the model's embeddings")
        if len(batch) <= self._max_num_seqs and all(map(_has_one_row, batch)):
            return self._decode(entries)
        products = self._decoder.products
        num_rows = sum(len(entry.token_ids) for entry in entries)
        num_logit_rows = sum(entry.num_logit_rows for entry in entries)
        shape = TableShape(
            products.num_rows(num_rows),
            len(entries),
            products.num_rows(num_logit_rows),
            max(-(-entry.end // self._decoder.block_size) for entry in entries),
        )
        tables = StepTables.over(self._written(shape, entries).to(self._device, non_blocking=True), shape)
        most = max(len(entry.token_ids) for entry in entries)
        # There are rows that fill up: more than one for each sequence.
        return self._decoder.forward(tables, max_queries=max(2, most))[:num_logit_rows]

    def _decode(self, entries: list[Entry], token_ids: Tensor | None = None) -> Tensor:
        """Logits [len(entries), vocab] of entries of one row; `token_ids` [len(entries)] in place of theirs."""
        graph = self._graphs[self._decoder.products.num_rows(len(entries))]
        graph.flat.copy_(self._written(graph.shape, entries), non_blocking=True)
        if token_ids is not None:
            graph.tables.token_ids[: len(entries)].copy_(token_ids)
        return graph.run()[: len(entries)]

    def _written(self, shape: TableShape, entries: list[Entry]) -> Tensor:
        """On the host, in memory that the device copies from by itself."""
        assert max(entry.end for entry in entries) <= self._decoder.max_positions
        flat = torch.empty(sum(shape.sizes), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        decoder = self._decoder
        write_tables(flat, shape, entries, block_size=decoder.block_size, padding_block=decoder.num_blocks)
        return flat


def _entry(scheduled: ScheduledSequence) -> Entry:
    return Entry(scheduled.token_ids, scheduled.start, scheduled.sequence.block_ids, scheduled.num_logit_rows)


def _has_one_row(scheduled: ScheduledSequence) -> bool:
    return scheduled.num_rows == scheduled.num_logit_rows == 1


def _can_go_on(scheduled: ScheduledSequence) -> bool:
    return _has_one_row(scheduled) and scheduled.completes_pass and scheduled.sequence.sampling.use_cache
