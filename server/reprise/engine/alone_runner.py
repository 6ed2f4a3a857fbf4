"""The padded tier where answers must repeat: every sequence is computed by itself, and always through the same shapes.

One forward over exactly the prompt, then one for each further token, whatever happened in between: after a
preemption, after a restart, or with `use_cache=False`, where nothing is kept, the same forwards are run again. So the
bits are the same for any model whose forward is a function of its input, and nothing is asked of its kernels.

A prompt that is scored has one more forward, over all of it: of its rows, those of later parts are kept for them as far
as they are few enough.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reprise.engine.padded_runner import CachedForward
from reprise.engine.scheduler import Batch, ScheduledSequence
from reprise.engine.sequence import Sequence, SequenceStatus

KEPT_LOGITS_BYTES = 256 << 20
"""Of a prompt that is scored in parts, for those that come later: beyond it the whole prompt is computed again."""


@dataclass(slots=True)
class Progress:
    """The first `num_tokens` of a sequence are in `cache`; 0 before its prompt was complete."""

    sequence: Sequence
    num_tokens: int = 0
    cache: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Logits [rows, vocab] of a sequence's prompt from token `start` on."""

    sequence: Sequence
    start: int
    logits: Tensor

    def of(self, scheduled: ScheduledSequence) -> Tensor | None:
        """The rows of that part; None where they are not all here."""
        first, end = scheduled.start - self.start, scheduled.end - self.start
        if self.sequence is not scheduled.sequence or first < 0 or end > self.logits.shape[0]:
            return None
        return self.logits[first:end]


class AloneRunner:
    """A pass may be scheduled in parts: the prompt is computed with its last part, further tokens with theirs.

    Progress is kept between steps for sequences that are running, and only while each step goes on where the one before
    ended; else the sequence is computed anew, from its prompt. Rows of a prompt that is scored are kept of one sequence
    at a time, since one prompt is computed after the other.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._forward = CachedForward(model)
        self._device = model.device
        self._progress: dict[int, Progress] = {}
        self._rows: PromptRows | None = None

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        self._progress = {
            i: held for i, held in self._progress.items() if held.sequence.status is SequenceStatus.RUNNING
        }
        if self._rows is not None and self._rows.sequence.status is not SequenceStatus.RUNNING:
            self._rows = None
        rows = [self._compute(scheduled) for scheduled in batch]
        wanted = [logits for logits in rows if logits is not None]
        return torch.cat(wanted) if wanted else torch.empty((0, 0), device=self._device)

    def forget(self, sequence: Sequence) -> None:
        self._progress.pop(sequence.sequence_id, None)
        if self._rows is not None and self._rows.sequence is sequence:
            self._rows = None

    def _compute(self, scheduled: ScheduledSequence) -> Tensor | None:
        """Logits [num_logit_rows, vocab]; None where no row is wanted."""
        sequence = scheduled.sequence
        # Taken out until all has gone well: a forward that fails may leave half a token in its cache.
        held = self._progress.pop(sequence.sequence_id, None)
        known = held.num_tokens if held is not None and held.sequence is sequence else 0
        # Parts of a prompt that have come so far are not computed, so its next part starts beyond what is known.
        goes_on = known == scheduled.start > 0
        progress = held if held is not None and goes_on else Progress(sequence)
        logits = self._advance(progress, scheduled.end)
        if not (scheduled.completes_pass and not sequence.sampling.use_cache):
            self._progress[sequence.sequence_id] = progress
        if sequence.scores_prompt:
            return self._score(scheduled, logits)
        return logits if scheduled.num_logit_rows else None

    def _advance(self, progress: Progress, end: int) -> Tensor | None:
        """Compute up to token `end`, in one forward for the prompt and one for each token after it. The last row."""
        sequence, logits = progress.sequence, None
        if progress.num_tokens == 0 and end >= sequence.num_prompt_tokens:
            logits = self._step(progress, 0, sequence.num_prompt_tokens)
        while sequence.num_prompt_tokens <= progress.num_tokens < end:
            logits = self._step(progress, progress.num_tokens, progress.num_tokens + 1)
        return logits

    def _step(self, progress: Progress, start: int, end: int) -> Tensor:
        tokens = progress.sequence.token_ids
        if start and not progress.cache:
            # A model without a cache: its whole input is computed, which depends on nothing else either.
            start = 0
        output = self._forward(
            torch.tensor([tokens[start:end]], device=self._device),
            torch.ones((1, end), dtype=torch.int64, device=self._device),
            progress.cache,
            first=start == 0,
            num_logits=1,
        )
        progress.cache = self._forward.cache_of(output)
        progress.num_tokens = end
        logits: Tensor = output.logits[0, -1:]
        return logits

    def _score(self, scheduled: ScheduledSequence, last: Tensor | None) -> Tensor:
        """Rows of a prompt, from a forward of their own: with all of its rows, the last one has other bits."""
        rows = self._rows.of(scheduled) if self._rows is not None else None
        if rows is None:
            self._rows = None  # not beside those that come now
            computed = self._all_rows(scheduled.sequence)
            rows = computed[scheduled.start : scheduled.end]
            num_kept = KEPT_LOGITS_BYTES // computed[0].nbytes
            later = computed[scheduled.end : scheduled.end + num_kept].clone()
            self._rows = PromptRows(scheduled.sequence, scheduled.end, later)
        if scheduled.end >= scheduled.sequence.num_prompt_tokens:
            self._rows = None
        return rows if last is None else torch.cat([rows[:-1], last])

    def _all_rows(self, sequence: Sequence) -> Tensor:
        """Logits [prompt, vocab]."""
        tokens = sequence.token_ids[: sequence.num_prompt_tokens]
        output = self._forward(
            torch.tensor([tokens], device=self._device),
            torch.ones((1, len(tokens)), dtype=torch.int64, device=self._device),
            {},
            first=True,
            num_logits=len(tokens),
            use_cache=False,
        )
        logits: Tensor = output.logits[0]
        return logits
