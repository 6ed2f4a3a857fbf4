"""From logits to token ids: each row by its own sequence's parameters, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reprise.engine import logits as processors
from reprise.engine.bad_words import AutomatonCache, BadWordAutomaton, TokenTable
from reprise.engine.device import Fetch, to_device
from reprise.engine.noise import draw_key
from reprise.engine.selection import Selection, TorchSelection, is_warped
from reprise.engine.sequence import Sequence
from reprise.types import TokenLogprobs

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them leaves float32's range."""
NUM_RANKED = 20
"""Alternatives that are always ranked: how ties fall depends on the number asked for, which neighbours decide."""
LOWEST_LOGPROB = -9999.0
"""OpenAI's number for «very unlikely»: JSON has no minus infinity."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A row's token, or why there is none."""

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    error_code: str | None = None


class _Constraints:
    """What a sequence's parameters forbid and favour, as tensors, kept up with its tokens.

    Derived from the token log alone: it can be dropped and made again at any time. `bad_words`: the automaton of the
    sequence's bad words, if it has any, and what each token spells.
    """

    def __init__(
        self,
        sequence: Sequence,
        vocab_size: int,
        bad_words: tuple[BadWordAutomaton, TokenTable] | None,
        device: torch.device,
    ) -> None:
        sampling = sequence.sampling
        self._sequence = sequence
        self._device = device
        self._num_consumed = 0
        self.counts: Tensor | None = None
        self.seen: Tensor | None = None
        self._allowed: Tensor | None = None
        self._bias: tuple[Tensor, Tensor] | None = None
        self.bad_words = bad_words
        self._bad_word_state = BadWordAutomaton.start
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = torch.zeros(vocab_size, device=device)
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen.index_fill_(0, to_device(sequence.token_ids[: sequence.num_prompt_tokens], device), value=True)
        if sampling.allowed_token_ids is not None:
            self._allowed = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._allowed.index_fill_(0, to_device(sampling.allowed_token_ids, device), value=True)
        if sampling.logit_bias:
            ids = to_device(list(sampling.logit_bias), device)
            self._bias = (ids, to_device(list(sampling.logit_bias.values()), device))

    def catch_up(self) -> None:
        """Take in the tokens generated since the last time."""
        # Not by an assignment to an index: on CUDA that copies the value from the host, and waits until it is there.
        for token_id in self._sequence.output_token_ids[self._num_consumed :]:
            if self.counts is not None:
                self.counts.narrow(0, token_id, 1).add_(1)
            if self.seen is not None:
                self.seen.narrow(0, token_id, 1).fill_(value=True)
            if self.bad_words is not None:
                automaton, table = self.bad_words
                self._bad_word_state = automaton.advance(self._bad_word_state, table.token_bytes[token_id])
        self._num_consumed = self._sequence.num_output_tokens

    def apply(self, row: Tensor) -> None:
        """Bias and masks, in place on one row [vocab]."""
        if self._bias is not None:
            row[self._bias[0]] += self._bias[1]
        if self._allowed is not None:
            row.masked_fill_(~self._allowed, processors.REMOVED)
        sampling = self._sequence.sampling
        if self._sequence.num_output_tokens < sampling.min_tokens:
            ending = [*sampling.end_token_ids, *sampling.stop_token_ids]
            row.index_fill_(0, to_device(ending, self._device, torch.int64), processors.REMOVED)
        if self.bad_words is not None:
            automaton, table = self.bad_words
            forbidden = automaton.forbidden(self._bad_word_state, table)[: row.shape[0]]
            row.masked_fill_(to_device(forbidden, self._device), processors.REMOVED)


class Sampler:
    """`token_bytes`: what each token spells, for bad words; None where the tokenizer cannot tell."""

    def __init__(self, token_bytes: list[bytes] | None = None, selection: Selection | None = None) -> None:
        self._token_bytes = token_bytes
        self._selection = selection or TorchSelection()
        self._table: TokenTable | None = None
        self._automata = AutomatonCache()
        self._constraints: dict[int, _Constraints] = {}

    def forget(self, sequence: Sequence) -> None:
        constraints = self._constraints.pop(sequence.sequence_id, None)
        if constraints is not None and constraints.bad_words is not None:
            self._automata.keep(constraints.bad_words[0])

    def sample(
        self,
        sequences: list[Sequence],
        logits: Tensor,
        ahead: list[int] | None = None,
        when_drawn: Callable[[Tensor], None] | None = None,
    ) -> list[Sampled]:
        """One token for each row of `logits` [B, vocab]. All that reaches the host is waited for together.

        `ahead`: of each row, how many tokens lie between the sequence's last one and the row's: none by default, else
        the sequence is not constrained. `when_drawn` is given the tokens [B] int64 while they are on their way.
        """
        raw = _as_float32(logits)
        scores = self.processed(sequences, raw)
        choices = self._selection.choose(scores, _keys(sequences, ahead))
        of_model = choices
        if any(sequence.is_constrained for sequence in sequences):
            # What is forbidden may be all that is a number, or is none.
            of_model = self._selection.choose(raw, [None] * len(sequences))
        counts = [sequence.sampling.num_logprobs for sequence in sequences]
        logprobs = None if counts.count(None) == len(counts) else RowLogprobs(raw, choices.token_ids, counts)
        if when_drawn is not None:
            when_drawn(choices.token_ids)
        rows = choices.rows()
        rows_of_model = rows if of_model is choices else of_model.rows()
        scored_rows = logprobs.rows() if logprobs is not None else [None] * len(rows)
        sampled = []
        for row, by_model, scored in zip(rows, rows_of_model, scored_rows, strict=True):
            if row.has_nan or by_model.has_nan or by_model.infinite:
                sampled.append(Sampled(error_code="numerical_error"))
            elif row.infinite < 0:
                sampled.append(Sampled(error_code="no_admissible_token"))
            else:
                sampled.append(Sampled(row.token_id, scored))
        return sampled

    def choose(self, sequences: list[Sequence], logits: Tensor, ahead: list[int]) -> list[int]:
        """The token ids that `sample` would give, and nothing else. Rows without numbers give any id."""
        scores = self.processed(sequences, _as_float32(logits))
        return [row.token_id for row in self._selection.choose(scores, _keys(sequences, ahead)).rows()]

    def processed(self, sequences: list[Sequence], raw: Tensor) -> Tensor:
        """The scores that the draw is made from [B, vocab] float32, in the order that SamplingParams states.

        `raw` itself where no sequence asks for anything.
        """
        scores = self._constrained(sequences, raw) if any(s.is_constrained for s in sequences) else raw
        warping = [s.sampling if s.sampling.temperature >= GREEDY_BELOW else None for s in sequences]
        if any(p is not None and is_warped(p) for p in warping):
            return self._selection.warp(scores, warping)
        return scores

    @torch.inference_mode()
    def _constrained(self, sequences: list[Sequence], raw: Tensor) -> Tensor:
        held: dict[int, _Constraints] = {}
        for row, sequence in enumerate(sequences):
            if sequence.is_constrained:
                held[row] = self._catch_up(sequence, raw)
        scores = raw.clone()
        for row, constraints in held.items():
            sampling = sequences[row].sampling
            if constraints.seen is not None:
                penalty = to_device([sampling.repetition_penalty], raw.device)
                scores[row] = processors.repetition_penalty(scores[row : row + 1], constraints.seen[None], penalty)[0]
            if constraints.counts is not None:
                presence = to_device([sampling.presence_penalty], raw.device)
                frequency = to_device([sampling.frequency_penalty], raw.device)
                scores[row] = processors.presence_and_frequency_penalty(
                    scores[row : row + 1], constraints.counts[None], presence, frequency
                )[0]
            constraints.apply(scores[row])
        return scores

    def _catch_up(self, sequence: Sequence, raw: Tensor) -> _Constraints:
        constraints = self._constraints.get(sequence.sequence_id)
        if constraints is None:
            words = sequence.sampling.bad_words
            bad_words = (self._automata.get(words), self._tokens(raw.shape[-1])) if words else None
            constraints = _Constraints(sequence, raw.shape[-1], bad_words, raw.device)
            self._constraints[sequence.sequence_id] = constraints
        constraints.catch_up()
        return constraints

    def _tokens(self, vocab_size: int) -> TokenTable:
        if self._table is None:
            assert self._token_bytes is not None
            self._table = TokenTable(self._token_bytes, vocab_size)
        return self._table


def _keys(sequences: list[Sequence], ahead: list[int] | None) -> list[int | None]:
    """Of the draw that each row is for; None where its temperature is 0."""
    return [
        draw_key(s.sampling.seed, s.choice_index, s.num_output_tokens + between)
        if s.sampling.temperature >= GREEDY_BELOW
        else None
        for s, between in zip(sequences, ahead or [0] * len(sequences), strict=True)
    ]


def _as_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float32 else logits.float()


def no_numbers(raw: Tensor) -> bool:
    """Whether some row of logits [B, vocab] holds NaN or plus infinity, or nothing but minus infinity."""
    rows = TorchSelection().choose(raw, [None] * raw.shape[0]).rows()
    return any(row.has_nan or row.infinite for row in rows)


class RowLogprobs:
    """Log-probabilities under the model's own distribution on their way to the host.

    Of `token_ids`, and of the `counts[row]` best; None where they are not asked for, which is not everywhere.
    """

    @torch.inference_mode()
    def __init__(self, raw: Tensor, token_ids: Tensor, counts: list[int | None]) -> None:
        """raw: [B, vocab] float32. token_ids: [B] int64."""
        self._counts = counts
        self._rows = [row for row, count in enumerate(counts) if count is not None]
        index = to_device(self._rows, raw.device)
        logprobs = raw[index].log_softmax(dim=-1).clamp(min=LOWEST_LOGPROB)
        ids = token_ids[index]
        most = min(max(NUM_RANKED, *(count for count in counts if count is not None)), raw.shape[-1])
        best, best_ids = torch.topk(logprobs, most, dim=-1)
        self._fetch = Fetch([ids, logprobs.gather(-1, ids[:, None])[:, 0], best_ids, best])

    def rows(self) -> list[TokenLogprobs | None]:
        """Waits until they are there."""
        result: list[TokenLogprobs | None] = [None] * len(self._counts)
        for row, token_id, chosen, best_ids, best in zip(self._rows, *self._fetch.lists(), strict=True):
            count = self._counts[row] or 0
            result[row] = TokenLogprobs(token_id, chosen, list(zip(best_ids[:count], best[:count], strict=True)))
        return result
