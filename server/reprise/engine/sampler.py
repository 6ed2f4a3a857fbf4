"""From logits to token ids: each row by its own sequence's parameters, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from reprise.engine import logits as processors
from reprise.engine.bad_words import BadWordAutomaton, TokenTable
from reprise.engine.noise import draw_key
from reprise.engine.selection import Highest, Selection, TorchSelection
from reprise.engine.sequence import Sequence
from reprise.types import SamplingParams, TokenLogprobs

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


@lru_cache(maxsize=64)
def _automaton(words: tuple[bytes, ...]) -> BadWordAutomaton:
    """Shared by all sequences that bar the same words, as the choices of a request do."""
    return BadWordAutomaton(words)


class _Constraints:
    """What a sequence's parameters forbid and favour, as tensors, kept up with its tokens.

    Derived from the token log alone: it can be dropped and made again at any time.
    """

    def __init__(self, sequence: Sequence, vocab_size: int, table: TokenTable | None, device: torch.device) -> None:
        sampling = sequence.sampling
        self._sequence = sequence
        self._device = device
        self._num_consumed = 0
        self.counts: Tensor | None = None
        self.seen: Tensor | None = None
        self._allowed: Tensor | None = None
        self._bias: tuple[Tensor, Tensor] | None = None
        self._bad_words: tuple[BadWordAutomaton, TokenTable] | None = None
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = torch.zeros(vocab_size, device=device)
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(sequence.token_ids[: sequence.num_prompt_tokens], device=device)] = True
        if sampling.allowed_token_ids is not None:
            self._allowed = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._allowed[torch.tensor(sampling.allowed_token_ids, device=device)] = True
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=device)
            self._bias = (ids, torch.tensor(list(sampling.logit_bias.values()), device=device))
        if sampling.bad_words:
            assert table is not None
            self._bad_words = (_automaton(sampling.bad_words), table)
            self._bad_word_state = self._bad_words[0].start

    def catch_up(self) -> None:
        """Take in the tokens generated since the last time."""
        for token_id in self._sequence.output_token_ids[self._num_consumed :]:
            if self.counts is not None:
                self.counts[token_id] += 1
            if self.seen is not None:
                self.seen[token_id] = True
            if self._bad_words is not None:
                automaton, table = self._bad_words
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
            row[torch.tensor([*sampling.end_token_ids, *sampling.stop_token_ids], dtype=torch.int64)] = (
                processors.REMOVED
            )
        if self._bad_words is not None:
            automaton, table = self._bad_words
            forbidden = torch.from_numpy(automaton.forbidden(self._bad_word_state, table))
            row.masked_fill_(forbidden[: row.shape[0]].to(self._device), processors.REMOVED)


class Sampler:
    """`token_bytes`: what each token spells, for bad words; None where the tokenizer cannot tell."""

    def __init__(self, token_bytes: list[bytes] | None = None, selection: Selection | None = None) -> None:
        self._token_bytes = token_bytes
        self._selection = selection or TorchSelection()
        self._table: TokenTable | None = None
        self._constraints: dict[int, _Constraints] = {}

    def forget(self, sequence: Sequence) -> None:
        self._constraints.pop(sequence.sequence_id, None)

    @torch.inference_mode()
    def sample(self, sequences: list[Sequence], logits: Tensor, ahead: list[int] | None = None) -> list[Sampled]:
        """One token for each row of `logits` [B, vocab]; the ids and log-probabilities reach the host once.

        `ahead`: of each row, how many tokens lie between the sequence's last one and the row's: none by default, else
        the sequence is not constrained.
        """
        raw = logits.float()
        scores = self.processed(sequences, raw)
        most_likely = self._selection.highest(raw)
        best = most_likely if scores is raw else self._selection.highest(scores)
        token_ids = self._draw(sequences, scores, best.token_ids, ahead or [0] * len(sequences))
        broken = _are_broken(most_likely) | best.has_nan
        barred = best.scores == processors.REMOVED
        logprobs = row_logprobs(raw, token_ids, [sequence.sampling.num_logprobs for sequence in sequences])
        sampled = []
        for row, (is_broken, is_barred, token_id) in enumerate(
            zip(broken.tolist(), barred.tolist(), token_ids.tolist(), strict=True)
        ):
            if is_broken:
                sampled.append(Sampled(error_code="numerical_error"))
            elif is_barred:
                sampled.append(Sampled(error_code="no_admissible_token"))
            else:
                sampled.append(Sampled(token_id, logprobs[row]))
        return sampled

    def processed(self, sequences: list[Sequence], raw: Tensor) -> Tensor:
        """The scores that the draw is made from [B, vocab] float32, in the order that SamplingParams states."""
        scores = self._constrained(sequences, raw)
        parameters = [sequence.sampling for sequence in sequences]
        for value, is_on, process in _WARPERS:
            rows = [row for row, p in enumerate(parameters) if p.temperature >= GREEDY_BELOW and is_on(p)]
            if rows:
                index = torch.tensor(rows, device=raw.device)
                values = torch.tensor([value(parameters[row]) for row in rows], device=raw.device)
                scores = scores.index_copy(0, index, process(scores[index], values))
        return scores

    def _constrained(self, sequences: list[Sequence], raw: Tensor) -> Tensor:
        held: dict[int, _Constraints] = {}
        for row, sequence in enumerate(sequences):
            if sequence.is_constrained:
                held[row] = self._catch_up(sequence, raw)
        if not held:
            return raw
        scores = raw.clone()
        for row, constraints in held.items():
            sampling = sequences[row].sampling
            if constraints.seen is not None:
                penalty = torch.tensor([sampling.repetition_penalty], device=raw.device)
                scores[row] = processors.repetition_penalty(scores[row : row + 1], constraints.seen[None], penalty)[0]
            if constraints.counts is not None:
                presence = torch.tensor([sampling.presence_penalty], device=raw.device)
                frequency = torch.tensor([sampling.frequency_penalty], device=raw.device)
                scores[row] = processors.presence_and_frequency_penalty(
                    scores[row : row + 1], constraints.counts[None], presence, frequency
                )[0]
            constraints.apply(scores[row])
        return scores

    def _catch_up(self, sequence: Sequence, raw: Tensor) -> _Constraints:
        constraints = self._constraints.get(sequence.sequence_id)
        if constraints is None:
            if sequence.sampling.bad_words and self._table is None:
                assert self._token_bytes is not None
                self._table = TokenTable(self._token_bytes, raw.shape[-1])
            constraints = _Constraints(sequence, raw.shape[-1], self._table, raw.device)
            self._constraints[sequence.sequence_id] = constraints
        constraints.catch_up()
        return constraints

    def _draw(self, sequences: list[Sequence], scores: Tensor, token_ids: Tensor, ahead: list[int]) -> Tensor:
        """[B] int64: of `token_ids`, the most likely ones, where the temperature is 0, else the Gumbel maximum."""
        rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature >= GREEDY_BELOW]
        if rows:
            keys = [
                draw_key(s.sampling.seed, s.choice_index, s.num_output_tokens + ahead[row])
                for row, s in ((row, sequences[row]) for row in rows)
            ]
            index = torch.tensor(rows, device=scores.device)
            drawn = self._selection.draw(scores if len(rows) == len(sequences) else scores[index], keys)
            token_ids = token_ids.index_copy(0, index, drawn)
        return token_ids


_Warper = tuple[Callable[[SamplingParams], float], Callable[[SamplingParams], bool], Callable[[Tensor, Tensor], Tensor]]
_WARPERS: tuple[_Warper, ...] = (
    (lambda p: p.temperature, lambda p: p.temperature != 1.0, processors.temperature),
    (lambda p: p.top_k, lambda p: p.top_k > 0, processors.top_k),
    (lambda p: p.top_p, lambda p: p.top_p < 1.0, processors.top_p),
    (lambda p: p.min_p, lambda p: p.min_p > 0.0, processors.min_p),
    (lambda p: p.typical_p, lambda p: p.typical_p < 1.0, processors.typical_p),
)


def no_numbers(raw: Tensor) -> Tensor:
    """[B] bool: the rows of logits that hold NaN or plus infinity, or nothing but minus infinity."""
    return _are_broken(TorchSelection().highest(raw))


def _are_broken(found: Highest) -> Tensor:
    return found.has_nan | torch.isinf(found.scores)


def row_logprobs(raw: Tensor, token_ids: Tensor, counts: list[int | None]) -> list[TokenLogprobs | None]:
    """Log-probabilities under the model's own distribution: of `token_ids` [B], and of the `counts[row]` best."""
    result: list[TokenLogprobs | None] = [None] * len(counts)
    rows = [row for row, count in enumerate(counts) if count is not None]
    if not rows:
        return result
    index = torch.tensor(rows, device=raw.device)
    logprobs = raw[index].float().log_softmax(dim=-1).clamp(min=LOWEST_LOGPROB)
    chosen = logprobs.gather(-1, token_ids[index][:, None])[:, 0].tolist()
    most = min(max(NUM_RANKED, *(count for count in counts if count is not None)), raw.shape[-1])
    best, best_ids = (t.tolist() for t in torch.topk(logprobs, most, dim=-1))
    for position, row in enumerate(rows):
        count = counts[row] or 0
        top = list(zip(best_ids[position][:count], best[position][:count], strict=True))
        result[row] = TokenLogprobs(int(token_ids[row]), chosen[position], top)
    return result
