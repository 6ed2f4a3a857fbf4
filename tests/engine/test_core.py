"""The engine's step around the model: how sequences end, what failures touch, what is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from reprise.engine.core import EngineCore
from reprise.engine.model_runner import ModelRunner, PagedRunner
from reprise.engine.sampler import RowLogprobs
from reprise.engine.scheduler import Batch
from reprise.engine.sequence import Sequence
from reprise.ipc.messages import Add
from reprise.types import FinishReason, SamplingParams
from support.engine_driver import Result, build_core, drain, greedy, load_from, run
from support.tiny_models import VOCAB_SIZE

ModelDirectory = Callable[[str], Path]
PROMPT = list(range(10, 25))


@pytest.fixture
def core(model_directory: ModelDirectory) -> EngineCore:
    return build_core(load_from(model_directory("llama")), None)


def first_tokens(core: EngineCore, count: int) -> list[int]:
    return run(core, [(PROMPT, greedy(count, end_token_ids=()))], first_id=900)[0].token_ids


def test_length_is_the_reason_at_max_tokens(core: EngineCore) -> None:
    result = run(core, [(PROMPT, greedy(4, end_token_ids=()))])[0]
    assert (result.finish_reason, len(result.token_ids)) == (FinishReason.LENGTH, 4)


def test_an_end_token_stops_even_at_the_last_allowed_place(core: EngineCore) -> None:
    tokens = first_tokens(core, 4)
    result = run(core, [(PROMPT, greedy(4, end_token_ids=(tokens[3],)))])[0]
    assert (result.finish_reason, result.stop_token_id) == (FinishReason.STOP, None)
    assert result.token_ids == tokens


def test_a_stop_token_is_named(core: EngineCore) -> None:
    tokens = first_tokens(core, 4)
    result = run(core, [(PROMPT, greedy(9, stop_token_ids=(tokens[2],)))])[0]
    assert (result.finish_reason, result.stop_token_id) == (FinishReason.STOP, tokens[2])
    assert result.token_ids == tokens[:3]


def test_min_tokens_keeps_an_end_token_away(core: EngineCore) -> None:
    tokens = first_tokens(core, 4)
    result = run(core, [(PROMPT, greedy(8, end_token_ids=(tokens[0],), min_tokens=6))])[0]
    assert tokens[0] not in result.token_ids[:6]
    assert len(result.token_ids) >= 6


def test_going_on_after_delivered_tokens_gives_the_same_tokens(core: EngineCore) -> None:
    whole = run(core, [(PROMPT, greedy(10, temperature=1.0, seed=77, end_token_ids=()))])[0]
    results = {50: Result(token_ids=whole.token_ids[:6])}
    sampling = greedy(10, temperature=1.0, seed=77, end_token_ids=())
    core.add(Add(50, 0, PROMPT, sampling, whole.token_ids[:6]))
    drain(core, results)
    assert results[50].token_ids == whole.token_ids


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_prompt_logprobs_are_those_of_the_models_own_forward(name: str, model_directory: ModelDirectory) -> None:
    loaded = load_from(model_directory(name), max_num_batched_tokens=8, max_num_seqs=4)
    core = build_core(loaded, None)
    run(core, [(PROMPT, greedy(2))], first_id=500)  # leaves a cached prefix, which scoring must not use
    result = run(core, [(PROMPT, greedy(0, num_prompt_logprobs=2)), (PROMPT, greedy(3))])[0]
    model = AutoModelForCausalLM.from_pretrained(model_directory(name))
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    assert result.finish_reason == FinishReason.LENGTH
    assert result.token_ids == []
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    assert len(result.prompt_logprobs) == len(PROMPT)
    for position, entry in enumerate(result.prompt_logprobs[1:], start=1):
        assert entry is not None
        assert entry.token_id == PROMPT[position]
        assert entry.logprob == pytest.approx(float(expected[position - 1, PROMPT[position]]), abs=1e-4)
        assert entry.top[0][0] == int(expected[position - 1].argmax())


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_a_prompt_is_scored_in_parts(
    name: str, model_directory: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them has a copy of its logits; those of the whole prompt are gigabytes."""
    core = build_core(load_from(model_directory(name)), None)
    whole = run(core, [(PROMPT, greedy(0, num_prompt_logprobs=2))])[0]
    sizes = []

    class Noted(RowLogprobs):
        def __init__(self, raw: torch.Tensor, token_ids: torch.Tensor, counts: list[int | None]) -> None:
            sizes.append(len(raw))
            super().__init__(raw, token_ids, counts)

    monkeypatch.setattr("reprise.engine.core.MAX_SCORED_ROWS", 3)
    monkeypatch.setattr("reprise.engine.core.RowLogprobs", Noted)
    in_parts = run(core, [(PROMPT, greedy(0, num_prompt_logprobs=2))])[0]
    assert in_parts.prompt_logprobs == whole.prompt_logprobs
    assert max(sizes) <= 3
    assert sum(sizes) == len(PROMPT) - 1


def test_an_unknown_or_finished_sequence_can_be_aborted(core: EngineCore) -> None:
    run(core, [(PROMPT, greedy(2))])
    assert core.abort([1, 99]) == []


class FailingRunner:
    """The real runner, but a forward that holds a certain token fails: with an exception or with NaN."""

    def __init__(self, runner: ModelRunner, poison: int, *, with_nan: bool) -> None:
        self._runner = runner
        self._poison = poison
        self._with_nan = with_nan

    def run(self, batch: Batch) -> Tensor:
        poisoned = [self._poison in s.sequence.token_ids[: s.sequence.num_prompt_tokens] for s in batch]
        if any(poisoned) and not self._with_nan:
            raise RuntimeError("poison")
        logits = self._runner.run(batch).clone()
        rows = [row for row, s in enumerate(batch) for _ in range(s.num_logit_rows)]
        for index, row in enumerate(rows):
            if poisoned[row]:
                logits[index] = float("nan")
        return logits

    def forget(self, sequence: Sequence) -> None:
        self._runner.forget(sequence)


@pytest.mark.parametrize("name", ["llama", "falcon"])
@pytest.mark.parametrize(("with_nan", "code"), [(False, "forward_error"), (True, "numerical_error")])
def test_a_poisoned_sequence_fails_alone(name: str, with_nan: bool, code: str, model_directory: ModelDirectory) -> None:
    clean = run(build_core(load_from(model_directory(name)), None), [(PROMPT, greedy(8))])[0]
    loaded = load_from(model_directory(name))
    loaded.runner = FailingRunner(loaded.runner, VOCAB_SIZE - 1, with_nan=with_nan)
    core = build_core(loaded, None)
    poisoned = [*PROMPT, VOCAB_SIZE - 1]
    good, bad, other = run(core, [(PROMPT, greedy(8)), (poisoned, greedy(8)), (PROMPT[:7], greedy(8))])
    assert bad.finish_reason == FinishReason.ERROR
    assert bad.error_code == code
    assert good.token_ids == clean.token_ids
    assert other.finish_reason in {FinishReason.STOP, FinishReason.LENGTH}


def test_what_a_failed_sequence_computed_is_not_found_again(model_directory: ModelDirectory) -> None:
    loaded = load_from(model_directory("llama"))
    runner = loaded.runner
    loaded.runner = FailingRunner(runner, PROMPT[0], with_nan=True)
    core = build_core(loaded, None)
    assert run(core, [(PROMPT, greedy(8))])[0].error_code == "numerical_error"
    assert core.stats().num_kv_tokens_cached == 0


def forget_numbers(core: EngineCore, blocks: list[int]) -> None:
    """Put NaN in the keys and values of these blocks."""
    assert isinstance(core._runner, PagedRunner)
    size = core._scheduler.pool.block_size
    slots = [slot for block in blocks for slot in range(block * size, (block + 1) * size)]
    for keys, values in core._runner._cache._layers.values():
        keys[slots] = values[slots] = float("nan")


def test_no_numbers_in_a_cached_prefix_cost_nobody_the_answer(
    core: EngineCore, model_directory: ModelDirectory
) -> None:
    """It is computed again by whoever finds them, and found by nobody after that."""
    request = (PROMPT, greedy(8, num_logprobs=1))
    clean = run(core, [request])[0]
    longer = ([*PROMPT, *clean.token_ids], greedy(8))
    expected = run(build_core(load_from(model_directory("llama")), None), [longer])[0]
    forget_numbers(core, list(core._scheduler.pool._cached))
    both = run(core, [request, request], first_id=10)
    assert [(r.token_ids, r.logprobs) for r in both] == [(clean.token_ids, clean.logprobs)] * 2
    for first_id, num_cached_tokens in [(20, 0), (30, 12)]:
        again = run(core, [request], first_id=first_id)[0]
        assert (again.token_ids, again.num_cached_tokens) == (clean.token_ids, num_cached_tokens)
    assert run(core, [longer], first_id=40)[0].token_ids == expected.token_ids


def test_no_numbers_in_blocks_that_several_read_end_whoever_wrote_them(model_directory: ModelDirectory) -> None:
    """One of the readers decodes, one is in the middle of its own, longer prompt."""
    core = build_core(load_from(model_directory("llama"), max_num_batched_tokens=8, max_num_seqs=4), None)
    long = [*PROMPT, *range(30, 60)]
    requests = [(PROMPT, greedy(20, end_token_ids=())), (PROMPT, greedy(12, end_token_ids=())), (long, greedy(8))]
    clean = run(core, requests)
    core = build_core(load_from(model_directory("llama"), max_num_batched_tokens=8, max_num_seqs=4), None)
    results = {number: Result() for number in range(1, 4)}
    for number, request in enumerate(requests, 1):
        core.add(Add(number, 0, *request))
    while not (len(results[2].token_ids) >= 2 and core._sequences[3].num_computed_tokens >= 12):
        for output in core.step():
            results[output.sequence_id].take(output)
    assert not results[3].token_ids
    writer, reader, waiter = (core._sequences[number].block_ids for number in results)
    assert writer[0] == reader[0] == waiter[0]
    forget_numbers(core, writer[:1])
    drain(core, results)
    assert results.pop(1).error_code == "numerical_error"
    assert [r.token_ids for r in results.values()] == [r.token_ids for r in clean[1:]]
    again = run(core, requests, first_id=10)
    assert [r.token_ids for r in again] == [r.token_ids for r in clean]


def test_statistics_count_what_happened(core: EngineCore) -> None:
    run(core, [(PROMPT, greedy(3, end_token_ids=())), (PROMPT, greedy(5, end_token_ids=()))])
    stats = core.stats()
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (2 * len(PROMPT), 8)
    assert stats.num_cached_tokens == 12
    assert (stats.num_running, stats.num_waiting, stats.num_kv_tokens_used) == (0, 0, 0)


def test_a_sequence_that_shares_a_failed_ones_blocks_starts_anew(model_directory: ModelDirectory) -> None:
    """The first of two equal prompts fails half way: the second must not read what it never computed."""
    clean = run(build_core(load_from(model_directory("llama")), None), [(PROMPT, greedy(8))])[0]
    loaded = load_from(model_directory("llama"))

    class FailsFirst(FailingRunner):
        def run(self, batch: Batch) -> Tensor:
            if any(s.sequence.sequence_id == 1 for s in batch):
                raise RuntimeError("poison")
            return self._runner.run(batch)

    loaded.runner = FailsFirst(loaded.runner, 0, with_nan=False)
    bad, good = run(build_core(loaded, None), [(PROMPT, greedy(8)), (PROMPT, greedy(8))])
    assert bad.error_code == "forward_error"
    assert good.token_ids == clean.token_ids


def test_a_failing_sampler_is_a_failed_sequence_too(model_directory: ModelDirectory) -> None:
    core = build_core(load_from(model_directory("llama")), None)
    out_of_vocabulary = greedy(8, logit_bias={VOCAB_SIZE + 5: 1.0})
    good, bad = run(core, [(PROMPT[:7], greedy(8)), (PROMPT, out_of_vocabulary)])
    assert bad.error_code == "forward_error"
    assert good.finish_reason in {FinishReason.STOP, FinishReason.LENGTH}


def test_what_can_never_fit_is_refused_and_holds_up_nobody(model_directory: ModelDirectory) -> None:
    """The pool of a later life of the engine may be smaller than the one that a request was admitted for."""
    loaded = load_from(model_directory("llama"))
    loaded.num_blocks = 5
    core = build_core(loaded, None)
    refused = core.add(Add(1, 0, list(range(4, 34)), greedy(8)))
    assert [output.error_code for output in refused] == ["capacity"]
    assert run(core, [(PROMPT[:3], greedy(2))], first_id=2)[0].finish_reason is not None


def test_masks_that_leave_nothing_cost_nobody_their_prefix(core: EngineCore) -> None:
    run(core, [(PROMPT, greedy(2))])
    result = run(core, [(PROMPT, greedy(2, allowed_token_ids=(3,), min_tokens=1))], first_id=10)[0]
    assert result.error_code == "no_admissible_token"
    assert run(core, [(PROMPT, greedy(2))], first_id=20)[0].num_cached_tokens == 12


def test_a_prompt_that_only_is_scored_fails_on_no_numbers_too(model_directory: ModelDirectory) -> None:
    loaded = load_from(model_directory("llama"))
    loaded.runner = FailingRunner(loaded.runner, PROMPT[0], with_nan=True)
    result = run(build_core(loaded, None), [(PROMPT, greedy(0, num_prompt_logprobs=1))])[0]
    assert result.error_code == "numerical_error"


SHORTAGES = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to"),
    torch.AcceleratorError("CUDA error: out of memory"),
]


class ShortRunner(FailingRunner):
    """The real runner, but memory runs out as a test says: it is given the batch and the number of the forward."""

    def __init__(self, runner: ModelRunner, is_short: Callable[[Batch, int], bool], error: Exception) -> None:
        super().__init__(runner, -1, with_nan=False)
        self._is_short = is_short
        self._error = error
        self.num_forwards = 0

    def run(self, batch: Batch) -> Tensor:
        self.num_forwards += 1
        if self._is_short(batch, self.num_forwards):
            raise self._error
        return self._runner.run(batch)


def num_tokens(batch: Batch) -> int:
    return sum(scheduled.num_tokens for scheduled in batch)


REQUESTS = [(PROMPT[: 5 + i], greedy(12, end_token_ids=(), temperature=float(i % 2), seed=i)) for i in range(8)]


def run_short(
    directory: Path,
    is_short: Callable[[Batch, int], bool],
    requests: list[tuple[list[int], SamplingParams]],
    error: Exception = SHORTAGES[0],
) -> tuple[list[Result], EngineCore, ShortRunner]:
    loaded = load_from(directory, max_num_batched_tokens=64, max_num_seqs=8)
    runner = ShortRunner(loaded.runner, is_short, error)
    loaded.runner = runner
    core = build_core(loaded, None)
    return run(core, requests), core, runner


@pytest.mark.parametrize("error", SHORTAGES, ids=["python", "cuda", "cpu allocator", "accelerator"])
def test_a_moment_without_memory_goes_unnoticed(error: Exception, model_directory: ModelDirectory) -> None:
    directory = model_directory("llama")
    clean, _, _ = run_short(directory, lambda _batch, _n: False, REQUESTS)
    results, core, _ = run_short(directory, lambda _batch, n: n in {1, 6, 7}, REQUESTS, error)
    assert results == clean
    assert core.stats().num_memory_shortages == 3
    assert core.stats().num_preemptions == 0


@pytest.mark.parametrize("name", ["llama", "falcon"])
@pytest.mark.parametrize("most", [1, 3])
def test_lasting_shortage_makes_steps_smaller_and_answers_stay(
    name: str, most: int, model_directory: ModelDirectory
) -> None:
    """The padded tier (falcon) answers as well; its bits may depend on company."""
    directory = model_directory(name)
    clean, _, _ = run_short(directory, lambda _batch, _n: False, REQUESTS)
    results, core, runner = run_short(directory, lambda batch, _n: len(batch) > most, REQUESTS)
    if name == "llama":
        assert [r.token_ids for r in results] == [r.token_ids for r in clean]
    assert [len(r.token_ids) for r in results] == [12] * 8
    assert core.stats().num_preemptions > 0
    assert core.stats().num_memory_shortages < runner.num_forwards / 2, "it ran into the same wall all the time"


def test_a_prompt_that_is_too_long_for_the_memory_is_computed_in_smaller_chunks(
    model_directory: ModelDirectory,
) -> None:
    directory = model_directory("llama")
    requests = [(list(range(10, 110)), greedy(5, end_token_ids=())), *REQUESTS]
    clean, _, _ = run_short(directory, lambda _batch, _n: False, requests)

    def is_short(batch: Batch, _number: int) -> bool:
        return any(scheduled.num_tokens > 20 for scheduled in batch)

    results, core, _ = run_short(directory, is_short, requests)
    assert [r.token_ids for r in results] == [r.token_ids for r in clean]
    assert core.stats().num_memory_shortages > 0


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_what_cannot_run_even_alone_is_told_so_and_the_others_go_on(name: str, model_directory: ModelDirectory) -> None:
    directory = model_directory(name)
    poisoned = ([*PROMPT[::-1], VOCAB_SIZE - 1], greedy(8))
    clean, _, _ = run_short(directory, lambda _batch, _n: False, REQUESTS)

    def is_short(batch: Batch, _number: int) -> bool:
        return any(VOCAB_SIZE - 1 in s.sequence.token_ids[: s.sequence.num_prompt_tokens] for s in batch)

    results, core, _ = run_short(directory, is_short, [poisoned, *REQUESTS])
    assert (results[0].finish_reason, results[0].error_code) == (FinishReason.ERROR, "capacity")
    if name == "llama":
        assert [r.token_ids for r in results[1:]] == [r.token_ids for r in clean]
    assert all(r.finish_reason is FinishReason.LENGTH for r in results[1:])
    assert core.stats().num_preemptions == 0, "the others had to suffer for it"


def test_sequences_that_share_a_prompt_survive_a_shortage_of_the_one_that_computes_it(
    model_directory: ModelDirectory,
) -> None:
    """The first of two equal prompts is restarted in smaller chunks: the second must not read what is not there."""
    directory = model_directory("llama")
    requests = [(list(range(10, 50)), greedy(6, end_token_ids=(), temperature=1.0, seed=n)) for n in range(2)]
    clean, _, _ = run_short(directory, lambda _batch, _n: False, requests)
    results, core, _ = run_short(directory, lambda batch, _n: num_tokens(batch) > 20, requests)
    assert [r.token_ids for r in results] == [r.token_ids for r in clean]
    assert core.stats().num_memory_shortages > 0


def test_nothing_reads_a_slot_that_it_did_not_write(model_directory: ModelDirectory) -> None:
    """Blocks are not wiped when they change hands: no numbers left there by a broken sequence must not matter."""
    directory = model_directory("llama")
    requests = [(PROMPT[: 1 + n], greedy(9, end_token_ids=(), seed=n)) for n in range(6)]
    clean = run(build_core(load_from(directory), None), requests)
    loaded = load_from(directory)
    assert isinstance(loaded.runner, PagedRunner)
    layers = list(loaded.runner._cache._layers.values())
    assert layers
    for keys, values in layers:
        keys.fill_(float("nan"))
        values.fill_(float("nan"))
    assert run(build_core(loaded, None), requests) == clean


def test_a_lost_device_is_not_taken_for_a_bad_request(model_directory: ModelDirectory) -> None:
    """A sticky CUDA error: every later forward would fail as well, so the process must go."""
    loaded = load_from(model_directory("llama"))

    class Lost(FailingRunner):
        def run(self, batch: Batch) -> Tensor:
            raise torch.AcceleratorError(f"device-side assert in a batch of {len(batch)}")

    loaded.runner = Lost(loaded.runner, 0, with_nan=False)
    core = build_core(loaded, None)
    core.add(Add(1, 0, PROMPT, greedy(2)))
    with pytest.raises(torch.AcceleratorError):
        core.step()
