"""The engine's step: schedule, run, sample, apply. Messages in, outputs out; no process, socket or clock."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from reprise.engine.device import to_device
from reprise.engine.model_runner import Anticipating, ModelRunner
from reprise.engine.sampler import RowLogprobs, Sampled, Sampler, no_numbers
from reprise.engine.scheduler import MAX_SCORED_ROWS, Batch, ScheduledSequence, Scheduler
from reprise.engine.sequence import Sequence
from reprise.engine.shortage import is_shortage, release_caches
from reprise.ipc.messages import Add, EngineStats, SequenceOutput
from reprise.types import FinishReason

logger = logging.getLogger(__name__)

Drawn = dict[int, list[Sampled]]
"""By sequence id, what was drawn from each row of its logits: a token, and one more behind each of its draft."""

ERROR_MESSAGES = {
    "numerical_error": "the model produced logits that are no numbers for this sequence",
    "no_admissible_token": "the request's masks (allowed_token_ids, bad_words, min_tokens) leave no token to choose",
    "forward_error": "the model's forward pass failed on this sequence",
    "capacity": "this engine has not the memory that prompt and max_tokens together need",
}
OUT_OF_MEMORY = "capacity"


class EngineCore:
    """Sequences over a scheduler, a runner and a sampler. `add` to `step` to the one terminal output of each."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, sampler: Sampler) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._anticipate = runner.anticipate if isinstance(runner, Anticipating) else None
        self._sampler = sampler
        self._sequences: dict[int, Sequence] = {}
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0
        self._num_memory_shortages = 0
        self._num_draft_tokens = 0
        self._num_kept_draft_tokens = 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def add(self, message: Add) -> list[SequenceOutput]:
        """Enqueue. A terminal output at once where the pool could not hold the sequence at its longest."""
        sequence = Sequence(
            message.sequence_id,
            choice_index=message.choice_index,
            prompt_token_ids=message.prompt_token_ids,
            sampling=message.sampling,
            output_token_ids=message.output_token_ids,
            prediction_token_ids=message.prediction_token_ids,
        )
        self._sequences[sequence.sequence_id] = sequence
        self._scheduler.add(sequence)
        pool = self._scheduler.pool
        if sequence.num_prompt_tokens + sequence.sampling.max_tokens > pool.num_blocks * pool.block_size:
            return [self._finish(sequence, FinishReason.ERROR, error_code="capacity")]
        return []

    def abort(self, sequence_ids: list[int]) -> list[SequenceOutput]:
        """Terminal outputs of those that were still alive."""
        alive = [self._sequences[i] for i in sequence_ids if i in self._sequences]
        return [self._finish(sequence, FinishReason.ABORT) for sequence in alive]

    def step(self) -> list[SequenceOutput]:
        """Compute one batch. A sequence that fails by itself ends in an error; the others go on or begin anew."""
        batch = self._scheduler.schedule()
        assert batch or not self._scheduler.has_work, "there is work that fits nowhere"
        self._num_steps += 1
        drawn = self._evaluate(batch)
        outputs = []
        for scheduled in batch:
            sequence = scheduled.sequence
            if sequence.sequence_id not in drawn:
                self._scheduler.restart(sequence)
                continue
            completes_pass = scheduled.completes_pass
            self._scheduler.advance(scheduled)
            rows = drawn[sequence.sequence_id]
            sampled = rows[0] if rows else None
            if sampled is not None and sampled.error_code is not None:
                if scheduled.draft_token_ids:
                    # What was guessed may be what failed, and has left it in the sequence's own block.
                    sequence.draft_failed = True
                    self._scheduler.restart(sequence)
                    continue
                if sampled.error_code == "numerical_error":
                    # Any block that it read may hold what is no number, those that it found in the cache as well.
                    if self._scheduler.recompute(sequence):
                        continue
                    self._scheduler.taint(sequence, 0)
                elif sampled.error_code != "no_admissible_token":
                    self._scheduler.taint(sequence, scheduled.start)
                outputs.append(self._finish(sequence, FinishReason.ERROR, error_code=sampled.error_code))
            elif completes_pass:
                outputs += self._append_all(scheduled, rows)
        return outputs

    def stats(self, step_seconds: float = 0.0) -> EngineStats:
        pool = self._scheduler.pool
        return EngineStats(
            num_steps=self._num_steps,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_kv_tokens_used=(pool.num_blocks - pool.num_free) * pool.block_size,
            num_kv_tokens_cached=pool.num_cached * pool.block_size,
            num_preemptions=self._scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_memory_shortages=self._num_memory_shortages,
            num_draft_tokens=self._num_draft_tokens,
            num_kept_draft_tokens=self._num_kept_draft_tokens,
            step_seconds=step_seconds,
        )

    def check(self) -> None:
        """Assert the invariants of everything below; for tests and idle moments."""
        self._scheduler.check()
        assert len(self._sequences) == self._scheduler.num_running + self._scheduler.num_waiting

    def _evaluate(self, batch: Batch) -> Drawn:
        """What the model draws for each sequence of the batch; nothing where nothing was to be drawn.

        After a failure the batch is computed in halves, down to single entries. One that fails alone gets an error,
        or is left out to be computed in smaller chunks where memory is what it lacks; one that shares blocks with it
        is left out as well, since what it would read is not to be trusted.
        """
        drawn: Drawn = {}
        tainted: set[int] = set()
        released = several_were_short = one_was_short = False
        parts = [batch]
        while parts:
            part = [s for s in parts.pop() if not tainted.intersection(s.sequence.block_ids)]
            if not part:
                continue
            error_code = self._attempt(part, drawn)
            if error_code == OUT_OF_MEMORY and not released:
                release_caches()  # once a step: it is slow, and the allocator has given back its own before it failed
                released = True
            if error_code == OUT_OF_MEMORY and len(part) == 1:
                error_code = self._attempt(part, drawn)
            if error_code is None:
                continue
            if len(part) > 1:
                several_were_short |= error_code == OUT_OF_MEMORY
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
                continue
            (scheduled,) = part
            sequence = scheduled.sequence
            tainted.update(sequence.block_ids[scheduled.start // self._scheduler.pool.block_size :])
            one_was_short |= error_code == OUT_OF_MEMORY
            if error_code != OUT_OF_MEMORY or not self._scheduler.shrink(scheduled):
                logger.warning("sequence %d fails alone: %s", sequence.sequence_id, error_code)
                drawn[sequence.sequence_id] = [Sampled(error_code=error_code)]
        self._scheduler.step_limit.note(short=several_were_short and not one_was_short)
        return drawn

    def _attempt(self, part: Batch, drawn: Drawn) -> str | None:
        """Compute entries together and take down what they draw; the code of the error where that fails."""
        try:
            drawn |= self._run(part)
        except Exception as error:  # whatever a model's code raises must not end the others
            short = is_shortage(error)
            if isinstance(error, torch.AcceleratorError) and not short:
                # The device's context is lost with it: only another process can go on.
                raise
            message = "a forward over %d sequences and %d tokens failed: %s"
            logger.warning(message, len(part), sum(s.num_tokens for s in part), type(error).__name__)
            if not short:
                frames = "".join(traceback.format_tb(error.__traceback__))
                logger.warning("it failed at\n%s", frames)
                return "forward_error"
        else:
            return None
        self._num_memory_shortages += 1
        return OUT_OF_MEMORY

    def _run(self, batch: Batch) -> Drawn:
        """Forward, prompt scores and draws. Changes no sequence but for its prompt's log-probabilities."""
        sampled = _sampled_rows(batch)
        drawn: Drawn = {s.sequence.sequence_id: [] for s in batch}
        logits = self._runner.run(batch)
        broken = _score_prompts(batch, logits)
        if sampled.rows:
            # Mostly all of them, of which no copy is needed.
            everything = len(sampled.rows) == logits.shape[0]
            chosen = logits if everything else logits[to_device(sampled.rows, logits.device)]
            when_drawn = partial(self._anticipate, batch) if self._anticipate else None
            choices = self._sampler.sample(sampled.sequences, chosen, sampled.ahead, when_drawn)
            for sequence, choice in zip(sampled.sequences, choices, strict=True):
                drawn[sequence.sequence_id].append(choice)
        return drawn | {sequence_id: [Sampled(error_code="numerical_error")] for sequence_id in broken}

    def _append_all(self, scheduled: ScheduledSequence, rows: list[Sampled]) -> list[SequenceOutput]:
        """Take the new token, and of the draft what it would have been anyway with what comes behind it.

        Each token has an output of its own, as if it had come alone.
        """
        sequence, draft = scheduled.sequence, scheduled.draft_token_ids
        outputs = [self._append(sequence, rows[0] if rows else None)]
        num_kept = 0
        for guess, token, behind in zip(draft, rows, rows[1:], strict=False):
            if guess != token.token_id or outputs[-1].finish_reason is not None or behind.error_code is not None:
                break
            num_kept += 1
            outputs.append(self._append(sequence, behind))
        self._num_draft_tokens += len(draft)
        self._num_kept_draft_tokens += num_kept
        if outputs[-1].finish_reason is None:
            self._scheduler.keep_drafts(scheduled, num_kept)
        return outputs

    def _append(self, sequence: Sequence, sampled: Sampled | None) -> SequenceOutput:
        """Take the new token (None: the prompt alone was to be scored) and decide whether it is the last."""
        if sampled is None:
            return self._finish(sequence, FinishReason.LENGTH)
        token_id = sampled.token_id
        assert token_id is not None
        sequence.token_ids.append(token_id)
        self._num_generated_tokens += 1
        params = sequence.sampling
        stop_token_id = token_id if token_id in params.stop_token_ids else None
        if stop_token_id is not None or token_id in params.end_token_ids:
            return self._finish(sequence, FinishReason.STOP, sampled, stop_token_id)
        if sequence.num_output_tokens >= params.max_tokens:
            return self._finish(sequence, FinishReason.LENGTH, sampled)
        return self._output(sequence, sampled)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        sampled: Sampled | None = None,
        stop_token_id: int | None = None,
        error_code: str | None = None,
    ) -> SequenceOutput:
        finished = self._scheduler.finish(sequence)
        assert finished
        del self._sequences[sequence.sequence_id]
        self._runner.forget(sequence)
        self._sampler.forget(sequence)
        return self._output(sequence, sampled, reason, stop_token_id, error_code)

    def _output(
        self,
        sequence: Sequence,
        sampled: Sampled | None,
        reason: FinishReason | None = None,
        stop_token_id: int | None = None,
        error_code: str | None = None,
    ) -> SequenceOutput:
        token_ids = [] if sampled is None or sampled.token_id is None else [sampled.token_id]
        first = not sequence.reported
        if first:
            sequence.reported = True
            self._num_prompt_tokens += sequence.num_prompt_tokens
            self._num_cached_tokens += sequence.num_cached_tokens or 0
        return SequenceOutput(
            sequence_id=sequence.sequence_id,
            position=sequence.num_output_tokens - len(token_ids),
            token_ids=token_ids,
            logprobs=[sampled.logprobs] if sampled is not None and sampled.logprobs is not None else None,
            prompt_logprobs=sequence.prompt_logprobs if first else None,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            error_code=error_code,
            error_message=ERROR_MESSAGES.get(error_code) if error_code else None,
        )


class _SampledRows(NamedTuple):
    """The rows of a step's logits that tokens are drawn from."""

    rows: list[int]
    sequences: list[Sequence]
    """Whose each is."""
    ahead: list[int]
    """Of each, the tokens of a draft that lie between the sequence's last one and the row's."""


def _sampled_rows(batch: Batch) -> _SampledRows:
    found = _SampledRows([], [], [])
    offset = 0
    for scheduled in batch:
        sequence = scheduled.sequence
        offset += scheduled.num_logit_rows
        if sequence.sampling.max_tokens > 0 and scheduled.completes_pass:
            count = 1 + len(scheduled.draft_token_ids)
            found.rows.extend(range(offset - count, offset))
            found.sequences.extend([sequence] * count)
            found.ahead.extend(range(count))
    return found


def _score_prompts(batch: Batch, logits: Tensor) -> set[int]:
    """Score those prompts that are to be. The ids of sequences whose logits are no numbers there."""
    broken: set[int] = set()
    if not any(scheduled.sequence.scores_prompt for scheduled in batch):
        return broken
    offset = 0
    for scheduled in batch:
        first, offset = offset, offset + scheduled.num_logit_rows
        if scheduled.sequence.scores_prompt:
            rows = torch.split(logits[first:offset], MAX_SCORED_ROWS)
            _score_prompt(scheduled, rows)
            if any(no_numbers(some.float()) for some in rows):
                broken.add(scheduled.sequence.sequence_id)
    return broken


def _score_prompt(scheduled: ScheduledSequence, rows: Iterable[Tensor]) -> None:
    """Log-probabilities of the prompt tokens that these positions predict: each the one after its own.

    rows: [n, vocab] each, one behind the other.
    """
    sequence = scheduled.sequence
    assert sequence.prompt_logprobs is not None
    count, first = sequence.sampling.num_prompt_logprobs, scheduled.start + 1
    for some in rows:
        targets = sequence.token_ids[first : min(first + len(some), sequence.num_prompt_tokens)]
        if targets:
            wanted = to_device(targets, some.device)
            scored = RowLogprobs(some[: len(targets)].float(), wanted, [count] * len(targets)).rows()
            sequence.prompt_logprobs[first : first + len(targets)] = scored
        first += len(some)
