"""The runner for CUDA, on the CPU: padding, tables and steps that are begun ahead of their time; not its kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reprise.engine import execution, loader
from reprise.engine.attention import ROW_MULTIPLE
from reprise.engine.core import EngineCore
from reprise.engine.cuda.attention import plain_attention
from reprise.engine.cuda.decoder import CudaDecoder, FusedWeights, unsupported
from reprise.engine.cuda.products import BlasSettings, Products, row_buckets
from reprise.engine.cuda.runner import STEPS_NOT_BEGUN, CudaRunner
from reprise.engine.decoder_gate import NativeGate, cuda_layers_gate
from reprise.engine.gate import paged_gate
from reprise.engine.scheduler import ScheduledSequence
from reprise.engine.sequence import Sequence, SequenceStatus
from reprise.errors import ModelLoadError
from reprise.ipc.messages import Add, EngineConfig
from reprise.types import SamplingParams
from support import tiny_models
from support.engine_driver import Result, build_core, drain, greedy, load_from, run

NAMES = ["llama", "qwen3", "mistral-window", "llama-dynamic"]
BLOCK_SIZE = 4
BUCKETS = Products(row_buckets(ROW_MULTIPLE, 256))
ModelDirectory = Callable[[str], Path]


def make_runner(model: PreTrainedModel, windows: list[int | None] | None = None, tile: int | None = None) -> CudaRunner:
    if windows is None:
        windows = [getattr(model.config, "sliding_window", None)] * model.config.num_hidden_layers
    weights = FusedWeights(model, windows)
    tiled = Products((128, 256), {matrix.shape: tile for matrix in weights.matrices if tile})
    decoder = CudaDecoder(
        model, weights, tiled if tile else BUCKETS, plain_attention,
        num_blocks=64, block_size=BLOCK_SIZE, max_positions=64,
    )  # fmt: skip
    return CudaRunner(decoder, 8)


def sequence(sequence_id: int, length: int, *, every_row: bool = False, max_tokens: int = 8) -> Sequence:
    generator = torch.Generator().manual_seed(sequence_id)
    prompt = torch.randint(4, tiny_models.VOCAB_SIZE, (length,), generator=generator).tolist()
    sampling = SamplingParams(seed=0, max_tokens=max_tokens, num_prompt_logprobs=0 if every_row else None)
    made = Sequence(sequence_id, choice_index=0, prompt_token_ids=prompt, sampling=sampling)
    made.status = SequenceStatus.RUNNING
    # Every third block, so that a mistake in the addressing cannot hide.
    made.block_ids = [sequence_id + 3 * index for index in range(-(-(length + 2) // BLOCK_SIZE))]
    return made


def own_logits(model: Any, token_ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


@pytest.mark.parametrize("tile", [None, 128])
@pytest.mark.parametrize("name", NAMES)
def test_a_ragged_step_gives_the_models_own_logits(name: str, tile: int | None) -> None:
    model = tiny_models.build(name)
    sequences = [sequence(0, 21, every_row=True), sequence(1, 1, every_row=True), sequence(2, 37, every_row=True)]
    expected = torch.cat([own_logits(model, s.token_ids) for s in sequences])
    found = make_runner(model, tile=tile).run([ScheduledSequence(s, 0, s.num_tokens) for s in sequences])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_models_of_the_family_pass_the_gates_and_can_still_be_run(name: str, dtype: torch.dtype) -> None:
    model = tiny_models.build(name, dtype, width=64)
    assert unsupported(model) == ""
    before = own_logits(model, list(range(30)))
    gate = NativeGate(model)
    assert gate.mismatch() == ""
    assert cuda_layers_gate(model, gate.windows) == ""
    assert gate.difference(make_runner(model, gate.windows), BLOCK_SIZE) == ""
    torch.testing.assert_close(own_logits(model, list(range(30))), before, rtol=0, atol=0)


def test_a_lost_window_is_found() -> None:
    model = tiny_models.build("mistral-window")
    gate = NativeGate(model)
    assert "differ" in cuda_layers_gate(model, [None, None])
    assert "differ" in gate.difference(make_runner(model, [None, None]), BLOCK_SIZE)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_others_are_refused_by_name(name: str) -> None:
    model = tiny_models.build(name)
    assert model.config.model_type in unsupported(model)


def test_decode_steps_have_the_bits_of_any_bucket_and_of_prompts() -> None:
    model = tiny_models.build("llama", width=320)
    runner = make_runner(model)
    sequences = [sequence(index, length) for index, length in zip(range(3), (9, 6, 14), strict=True)]
    whole = [runner.run([ScheduledSequence(s, 0, s.num_tokens)]).clone() for s in sequences]
    last = [ScheduledSequence(s, s.num_tokens - 1, 1) for s in sequences]
    together = runner.run(last).clone()
    assert torch.equal(together, torch.cat(whole))
    more = [*last, *(ScheduledSequence(sequence(2, 14), 13, 1) for _ in range(4))]
    assert torch.equal(runner.run(more)[:3], together)
    assert torch.equal(runner.run(last[1:2]), together[1:2])


class TestAnticipation:
    """A step that was begun ahead gives the same bits as one that was not."""

    def test_what_is_asked_for_is_taken_and_the_rest_computed(self) -> None:
        model = tiny_models.build("llama", width=320)
        runner, plain = make_runner(model), make_runner(model)
        sequences = [sequence(index, length) for index, length in zip(range(3), (9, 6, 13), strict=True)]
        new_one = sequence(100, 5)
        new_one.block_ids = [40, 41]
        batch = [ScheduledSequence(s, s.num_tokens - 1, 1) for s in sequences]
        for each in (runner, plain):
            each.run([ScheduledSequence(s, 0, s.num_tokens) for s in sequences])
        token_ids = torch.tensor([11, 22, 33])

        def next_step(*of: int) -> list[ScheduledSequence]:
            return [ScheduledSequence(sequences[i], sequences[i].num_tokens - 1, 1) for i in of]

        runner.anticipate(batch, token_ids)
        for one, token_id in zip(sequences, token_ids.tolist(), strict=True):
            one.token_ids.append(token_id)
        expected = plain.run(next_step(0, 1, 2)).clone()
        assert torch.equal(runner.run(next_step(0, 1, 2)), expected)
        assert runner.num_anticipated_rows == 3

        for one in sequences:
            one.token_ids.pop()
        runner.anticipate(batch, token_ids)
        for one, token_id in zip(sequences, token_ids.tolist(), strict=True):
            one.token_ids.append(token_id)
        # One has left, one came, and they come in another order.
        mixed = [*next_step(2), ScheduledSequence(new_one, 0, 5), *next_step(0)]
        expected = plain.run(mixed).clone()
        assert torch.equal(runner.run(mixed), expected)
        assert runner.num_anticipated_rows == 5
        assert torch.equal(runner.run(next_step(1)), plain.run(next_step(1)))
        assert runner.num_anticipated_rows == 5

    def test_a_step_begun_for_one_that_has_ended_stops_no_other(self) -> None:
        runner = make_runner(tiny_models.build("llama"))
        ended, following = sequence(0, 9), sequence(1, 7)
        runner.run([ScheduledSequence(ended, 0, 9)])
        runner.anticipate([ScheduledSequence(ended, 8, 1)], torch.tensor([11]))
        runner.run([ScheduledSequence(following, 0, 7)])
        runner.anticipate([ScheduledSequence(following, 6, 1)], torch.tensor([11]))
        assert runner._anticipated is not None

    def test_moved_sequences_and_other_places_are_computed_anew(self) -> None:
        model = tiny_models.build("llama")
        runner, plain = make_runner(model), make_runner(model)
        one = sequence(0, 9)
        for each in (runner, plain):
            each.run([ScheduledSequence(one, 0, 9)])
        runner.anticipate([ScheduledSequence(one, 8, 1)], torch.tensor([11]))
        one.token_ids.append(12)
        one.block_ids = [50, 51, 52]
        for each in (runner, plain):
            each.run([ScheduledSequence(one, 0, 9)])
        step = [ScheduledSequence(one, 9, 1)]
        assert torch.equal(runner.run(step), plain.run(step))
        assert runner.num_anticipated_rows == 0
        # What nobody asked for cost a step: for a while none is begun.
        for _ in range(STEPS_NOT_BEGUN):
            runner.anticipate(step, torch.tensor([13]))
            assert runner._anticipated is None
        runner.anticipate(step, torch.tensor([13]))
        assert runner._anticipated is not None

    def test_nothing_is_begun_without_a_place_or_for_the_last_token(self) -> None:
        runner = make_runner(tiny_models.build("llama"))
        full, last, prompt = sequence(0, 8), sequence(1, 9, max_tokens=1), sequence(2, 9)
        full.block_ids = full.block_ids[:2]
        for scheduled in (
            ScheduledSequence(full, 7, 1),
            ScheduledSequence(last, 8, 1),
            ScheduledSequence(prompt, 0, 9),
        ):
            runner.anticipate([scheduled], torch.tensor([5]))
            assert runner._anticipated is None


def load_core(directory: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> EngineCore:
    monkeypatch.setattr(loader, "choose_execution", execution.cuda_paged)
    loaded = load_from(directory, kernels="auto", kv_cache_memory=1 << 24, block_size=16, **config)
    assert (loaded.ready.tier, loaded.ready.kernels[:4]) == ("paged", "cuda")
    return build_core(loaded, None)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_engine_says_what_generate_says(
    name: str, wide_directory: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = load_core(wide_directory(name), monkeypatch, dtype="float32")
    model: Any = tiny_models.build(name, width=320)
    prompts = [sequence(index, 5 + 7 * index).token_ids for index in range(4)]
    found = run(core, [(prompt, greedy(10)) for prompt in prompts])
    for prompt, result in zip(prompts, found, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)[0, len(prompt) :]
        assert result.token_ids == expected.tolist()
    # A step after which a sequence begins a block is not followed by one that was begun ahead.
    assert core._runner.num_anticipated_rows > 10  # type: ignore[attr-defined]  # a CudaRunner


def test_ends_arrivals_and_aborts_in_between_change_nothing(
    wide_directory: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = load_core(wide_directory("llama"), monkeypatch, dtype="float32", max_num_seqs=3)
    requests = [
        (sequence(index, 4 + index).token_ids, greedy(6 + 5 * (index % 3), temperature=index % 2 * 1.0, seed=index))
        for index in range(9)
    ]
    alone = [run(core, [request], first_id=100 + index)[0].token_ids for index, request in enumerate(requests)]
    together = [result.token_ids for result in run(core, requests, first_id=200)]
    assert together == alone
    results = {300: Result()}
    core.add(Add(300, 0, *requests[1]))
    core.add(Add(301, 0, *requests[2]))
    for _ in range(3):
        for output in core.step():
            if output.sequence_id == 300:
                results[300].take(output)
    core.abort([301])
    drain(core, results)
    assert results[300].token_ids == alone[1]


@pytest.mark.parametrize("outcome", ["runs", "refused", "fails", "lost"])
def test_settings_of_cuda_stay_only_where_it_runs(outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else in the process would compute with them."""
    model = tiny_models.build("llama")
    applied: list[BlasSettings] = []
    settings = BlasSettings("cublas", (True, True), (True, True))

    def checked(*_: Any) -> execution.Execution | str:
        if outcome in ("fails", "lost"):
            raise RuntimeError("no kernel")
        return execution.torch_paged(model, config, gate, 64, torch.device("cpu")) if outcome == "runs" else "no"

    config = EngineConfig(model="m", kv_cache_memory=1 << 20)
    gate = paged_gate(model)
    monkeypatch.setattr(BlasSettings, "now", lambda: settings)
    monkeypatch.setattr(BlasSettings, "apply", lambda applies: applied.append(applies))  # noqa: PLW0108 # bound
    monkeypatch.setattr(execution, "_checked_cuda_paged", checked)
    monkeypatch.setattr(execution, "is_lost", lambda _: outcome == "lost")
    arguments = (model, config, 64, torch.device("cuda"))
    if outcome == "lost":
        with pytest.raises(ModelLoadError, match="broke the GPU"):
            execution.cuda_paged(*arguments)
    else:
        found = execution.cuda_paged(*arguments)
        assert isinstance(found, execution.Execution) == (outcome == "runs")
    assert applied == ([] if outcome == "runs" else [settings])


def test_a_torch_whose_attention_splits_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reprise.engine.cuda.decoder.varlen_attn", lambda query: query)
    assert "one order" in unsupported(tiny_models.build("llama"))
