"""The padded tier: any model that transformers can generate with, in left-padded cohorts that share a forward.

A cohort is made of sequences whose first pass fell into one step. It keeps transformers' own cache and moves on by
one token a step; sequences that end leave it. A sequence that is scheduled but in no cohort, for whatever
reason, is computed whole: so losing a cohort costs time and nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reprise.engine.scheduler import Batch, ScheduledSequence
from reprise.engine.sequence import Sequence

CACHE_NAMES = ("past_key_values", "cache_params", "state")


class CachedForward:
    """A forward pass over transformers' own cache, prepared as `generate` prepares it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self.keeps_logits = "logits_to_keep" in parameters

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        cache: dict[str, Any],
        *,
        first: bool,
        num_logits: int,
        use_cache: bool = True,
    ) -> Any:
        """`cache`: what `cache_of` gave for the tokens before, by its name; empty for the first ones."""
        arguments: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": use_cache, **cache}
        if self.keeps_logits:
            arguments["logits_to_keep"] = num_logits
        if self._takes_positions:
            positions = attention_mask.cumsum(-1) - 1
            arguments["position_ids"] = positions.clamp(min=0)[:, -input_ids.shape[1] :]
        prepare: Callable[..., dict[str, Any]] = getattr(self._model, "prepare_inputs_for_generation")  # noqa: B009 # a mixin gives it
        inputs = prepare(input_ids, is_first_iteration=first, **arguments)
        return self._model(**inputs)

    @staticmethod
    def cache_of(output: Any) -> dict[str, Any]:
        """The cache in an output, under the name by which the next forward takes it; empty where there is none."""
        return next(({name: output[name]} for name in CACHE_NAMES if output.get(name) is not None), {})


@dataclass(slots=True, eq=False)
class Cohort:
    """Rows in lockstep. `attention_mask`: [rows, padded length], 0 on the left padding."""

    sequences: list[Sequence]
    num_tokens: list[int]
    attention_mask: Tensor
    cache: Any
    cache_name: str

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        index = torch.tensor(rows, device=self.attention_mask.device)
        self.cache.reorder_cache(index)
        self.attention_mask = self.attention_mask[index]
        self.sequences = [self.sequences[row] for row in rows]
        self.num_tokens = [self.num_tokens[row] for row in rows]


class PaddedRunner:
    """`padding_is_inert`: whether the gate found that left padding leaves a row's logits alone; if not, only
    prompts of one length share a cohort.
    """

    def __init__(self, model: PreTrainedModel, *, max_padded_tokens: int, padding_is_inert: bool = True) -> None:
        self._forward = CachedForward(model)
        self._device = model.device
        self._max_padded_tokens = max_padded_tokens
        self._padding_is_inert = padding_is_inert
        self._cohorts: list[Cohort] = []

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        by_id = {scheduled.sequence.sequence_id: scheduled for scheduled in batch}
        logits: dict[int, Tensor] = {}
        cohorts, self._cohorts = self._cohorts, []
        for cohort in cohorts:
            if self._trim(cohort, by_id):
                logits |= self._decode(cohort)
                self._cohorts.append(cohort)
        rest = [s for s in batch if s.sequence.sequence_id not in logits]
        for group in self._groups(rest):
            logits |= self._prefill(group)
        return torch.cat([logits[s.sequence.sequence_id] for s in batch if s.num_logit_rows])

    def forget(self, sequence: Sequence) -> None:
        """Leave the row where it is: the cohort's next step drops what is not scheduled with it."""

    def _trim(self, cohort: Cohort, by_id: dict[int, ScheduledSequence]) -> bool:
        """Keep the rows that this step moves on by one token. False where none is left."""
        rows = []
        for row, sequence in enumerate(cohort.sequences):
            scheduled = by_id.get(sequence.sequence_id)
            if (
                scheduled is not None
                and scheduled.sequence is sequence
                and scheduled.num_tokens == 1
                and scheduled.start == cohort.num_tokens[row]
            ):
                rows.append(row)
        if not rows:
            return False
        if len(rows) < len(cohort.sequences):
            if not hasattr(cohort.cache, "reorder_cache"):
                return False
            cohort.keep(rows)
        return True

    def _decode(self, cohort: Cohort) -> dict[int, Tensor]:
        ones = cohort.attention_mask.new_ones(len(cohort.sequences), 1)
        cohort.attention_mask = torch.cat([cohort.attention_mask, ones], dim=1)
        last = [[s.token_ids[n]] for s, n in zip(cohort.sequences, cohort.num_tokens, strict=True)]
        output = self._forward(
            torch.tensor(last, device=self._device),
            cohort.attention_mask,
            {cohort.cache_name: cohort.cache},
            first=False,
            num_logits=1,
        )
        cohort.cache = output[cohort.cache_name]
        cohort.num_tokens = [n + 1 for n in cohort.num_tokens]
        return {s.sequence_id: output.logits[row, -1:] for row, s in enumerate(cohort.sequences)}

    def _groups(self, rest: list[ScheduledSequence]) -> list[list[ScheduledSequence]]:
        """First passes that are worth sharing a forward: of like lengths, within the memory of one step."""
        groups: list[list[ScheduledSequence]] = []
        for scheduled in sorted(rest, key=lambda s: (s.sequence.sampling.use_cache, s.end), reverse=True):
            if groups:
                longest, group = groups[-1][0], groups[-1]
                fits = longest.end * (len(group) + 1) <= self._max_padded_tokens
                alike = (
                    longest.end <= 2 * scheduled.end + 32 if self._padding_is_inert else longest.end == scheduled.end
                )
                if fits and alike and longest.sequence.sampling.use_cache == scheduled.sequence.sampling.use_cache:
                    group.append(scheduled)
                    continue
            groups.append([scheduled])
        return groups

    def _prefill(self, group: list[ScheduledSequence]) -> dict[int, Tensor]:
        longest = group[0].end
        input_ids = torch.zeros((len(group), longest), dtype=torch.int64)
        attention_mask = torch.zeros((len(group), longest), dtype=torch.int64)
        for row, scheduled in enumerate(group):
            input_ids[row, longest - scheduled.end :] = torch.tensor(scheduled.sequence.token_ids[: scheduled.end])
            attention_mask[row, longest - scheduled.end :] = 1
        attention_mask = attention_mask.to(self._device)
        use_cache = group[0].sequence.sampling.use_cache
        num_logits = max(s.num_logit_rows for s in group)
        output = self._forward(
            input_ids.to(self._device), attention_mask, {}, first=True, use_cache=use_cache, num_logits=num_logits
        )
        if use_cache:
            for name, cache in self._forward.cache_of(output).items():
                sequences = [s.sequence for s in group]
                lengths = [s.end for s in group]
                self._cohorts.append(Cohort(sequences, lengths, attention_mask, cache, name))
        return {
            s.sequence.sequence_id: output.logits[row, output.logits.shape[1] - s.num_logit_rows :]
            for row, s in enumerate(group)
        }
