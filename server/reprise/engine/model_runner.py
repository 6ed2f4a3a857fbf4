"""The forward pass: a batch in, logits out. One runner for each tier, behind one protocol."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reprise.engine.attention import ROW_MULTIPLE, AttentionStep, SequenceSpan, attention_step
from reprise.engine.elementwise import bind_late, fixed_elementwise
from reprise.engine.kv_cache import KVCache
from reprise.engine.scheduler import Batch, ScheduledSequence
from reprise.engine.sequence import Sequence


class ModelRunner(Protocol):
    """What the engine core asks of a tier."""

    def run(self, batch: Batch) -> Tensor:
        """Logits [R, vocab] in the batch's order: for each entry its last `num_logit_rows` positions."""

    def forget(self, sequence: Sequence) -> None:
        """A sequence ended or lost its place: drop whatever is held for it."""


@runtime_checkable
class Anticipating(Protocol):
    """A runner that begins a step before its tokens are known to the host."""

    def anticipate(self, batch: Batch, token_ids: Tensor) -> None:
        """Begin what comes after `batch`, whose entries were given these tokens [rows] int64, on the device still.

        The next `run` may be another step; then this had no effect.
        """


class PagedRunner:
    """Packs the batch into one ragged row [1, T]; keys and values live in the block pool's slots.

    T, and the number of logits rows, is a multiple of ROW_MULTIPLE: with fewer or odd rows a matrix product may take
    another kernel, and a row's bits would depend on its company. The rows that fill up belong to nobody. Without
    `fixed_order` there are none, and torch's own attention is used.
    """

    def __init__(self, model: PreTrainedModel, cache: KVCache, block_size: int, *, fixed_order: bool = True) -> None:
        self._model = model
        self._cache = cache
        self._block_size = block_size
        self._fixed_order = fixed_order
        if fixed_order:
            bind_late(model)
        self._offsets = torch.arange(block_size)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.last_calls: dict[torch.nn.Module, int] = {}

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        device = self._cache.device
        input_ids: list[int] = []
        position_ids: list[int] = []
        logit_rows: list[int] = []
        spans: list[SequenceSpan] = []
        new_slots: list[Tensor] = []
        for scheduled in batch:
            start = len(input_ids)
            slots = self._slots(scheduled)
            new_slots.append(slots[scheduled.start :])
            spans.append(SequenceSpan(start, scheduled.num_rows, slots.to(device)))
            input_ids += scheduled.token_ids
            position_ids += range(scheduled.start, scheduled.start + scheduled.num_rows)
            logit_rows += range(len(input_ids) - scheduled.num_logit_rows, len(input_ids))
        row_multiple = ROW_MULTIPLE if self._fixed_order else 1
        padding = -len(input_ids) % row_multiple
        input_ids += [0] * padding
        position_ids += [0] * padding
        new_slots.append(torch.full((padding,), self._cache.padding_slot))
        num_rows = len(logit_rows)
        logit_rows += logit_rows[-1:] * (-num_rows % row_multiple)
        step = AttentionStep(self._cache, spans, torch.cat(new_slots).to(device), fixed_order=self._fixed_order)
        rows = torch.tensor(logit_rows, device=device, dtype=torch.int64)
        with attention_step(step), fixed_elementwise() if self._fixed_order else nullcontext():
            output = self._model(
                input_ids=torch.tensor([input_ids], device=device),
                position_ids=torch.tensor([position_ids], device=device),
                use_cache=False,
                **({"logits_to_keep": rows} if self._keeps_logits else {}),
            )
        self.last_calls = step.calls
        logits: Tensor = output.logits[0]
        return (logits if self._keeps_logits else logits[rows])[:num_rows]

    def forget(self, sequence: Sequence) -> None:
        """Nothing to drop: the block pool has it all."""

    def _slots(self, scheduled: ScheduledSequence) -> Tensor:
        blocks = torch.tensor(scheduled.sequence.block_ids, dtype=torch.int64)
        return (blocks[:, None] * self._block_size + self._offsets).flatten()[: scheduled.start + scheduled.num_rows]
