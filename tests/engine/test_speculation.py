"""Several tokens in one step: the same answers to the last bit, in fewer steps."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reprise.engine.core import EngineCore
from reprise.engine.loader import LoadedModel
from reprise.engine.model_runner import ModelRunner
from reprise.engine.native.library import built_variants
from reprise.engine.scheduler import Batch
from reprise.engine.sequence import Sequence
from reprise.ipc.messages import Add
from reprise.types import FinishReason
from support import tiny_models
from support.engine_driver import Result, build_core, greedy, load_from, run

ModelDirectory = Callable[[str], Path]
LOOP = [5, 9, 13, 21, 34, 55]
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not built_variants(), reason="was not built for this CPU"))
KERNELS = ["torch", NATIVE]
ORIGINS = ["ngram", "draft", "prediction"]


def _repetitive(*, noise: float = 0.0) -> Any:
    """A model whose next token follows nearly from the last alone and is one of few: it soon goes round in circles.

    `noise`: how much its weights are changed, as a share of their size.
    """
    model: Any = tiny_models.build("llama", width=320)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(0.02)
        model.get_output_embeddings().weight[12:].mul_(0.1)
        for parameter in model.parameters() if noise else ():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * noise)
    return model


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("repetitive")
    _repetitive().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def like_it(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that often says the same as `repetitive`, and often not."""
    directory = tmp_path_factory.mktemp("like-it")
    torch.manual_seed(3)
    _repetitive(noise=0.2).save_pretrained(directory)
    return directory


def requests() -> list[tuple[list[int], Any]]:
    """Of all kinds."""
    changes: list[dict[str, Any]] = [
        {},
        {"num_logprobs": 3},
        {"temperature": 0.3, "seed": 3, "num_logprobs": 0},
        {"temperature": 1.0, "seed": 4, "top_k": 3},
        {"temperature": 0.6, "seed": 5, "top_p": 0.6},
        {"repetition_penalty": 1.2},
        {"frequency_penalty": 0.4, "temperature": 0.5, "seed": 6},
        {"min_tokens": 30, "num_logprobs": 1},
        {"use_cache": False, "max_tokens": 12},
        {"num_prompt_logprobs": 1},
        {"logit_bias": {7: 5.0}},
        {"max_tokens": 1},
    ]
    return [
        ((LOOP * 6)[index : 20 + 2 * index], greedy(**{"max_tokens": 48, "end_token_ids": (), **change}))
        for index, change in enumerate(changes)
    ]


def loaded_from(directory: Path, kernels: str, origin: str = "none", draft: Path | None = None) -> LoadedModel:
    speculate = origin if origin in ("ngram", "draft") else "none"
    loaded = load_from(
        directory,
        kernels=kernels,
        speculate=speculate,
        dtype="float32",
        block_size=4,
        kv_cache_memory=1 << 25,
        draft_model=str(draft or directory) if speculate == "draft" else None,
    )
    assert loaded.ready.deterministic
    return loaded


def core_of(directory: Path, kernels: str, origin: str = "none", draft: Path | None = None) -> EngineCore:
    return build_core(loaded_from(directory, kernels, origin, draft), None)


def one_by_one(core: EngineCore, predictions: list[list[int]] | None = None) -> list[Result]:
    return [
        run(core, [request], first_id=100 + index, prediction=predictions[index] if predictions else None)[0]
        for index, request in enumerate(requests())
    ]


def edited(token_ids: list[int], generator: random.Random) -> list[int]:
    """What was said, with tokens replaced, left out and added: most of it is still there."""
    found = []
    for token_id in token_ids:
        change = generator.random()
        found += [generator.randrange(12)] if change < 0.05 else [token_id] if change > 0.1 else []
        if change > 0.95:
            found.append(generator.randrange(12))
    return found


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_answers_are_the_same(kernels: str, origin: str, repetitive: Path, like_it: Path) -> None:
    plain = core_of(repetitive, kernels)
    speculating = core_of(repetitive, kernels, origin, like_it)
    expected = one_by_one(plain)
    predictions = None
    if origin == "prediction":
        generator = random.Random(1)
        predictions = [edited(result.token_ids, generator) for result in expected]
    found = one_by_one(speculating, predictions)
    # Over what the first time left in the prefix cache, drafts' blocks among it.
    cached = one_by_one(speculating, predictions)
    for index, results in enumerate(zip(expected, found, cached, strict=True)):
        first, *others = ((r.token_ids, r.logprobs, r.prompt_logprobs, r.finish_reason) for r in results)
        assert others == [first, first], f"request {index}"
    stats = speculating.stats()
    assert plain.stats().num_draft_tokens == 0
    assert stats.num_draft_tokens > stats.num_kept_draft_tokens > 100
    assert stats.num_generated_tokens == 2 * plain.stats().num_generated_tokens
    assert stats.num_steps + stats.num_kept_draft_tokens == 2 * plain.stats().num_steps


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_end_comes_where_it_would_have_come(kernels: str, origin: str, repetitive: Path) -> None:
    """An end token, or a stop token, within a draft: what would follow it is not said."""
    plain = core_of(repetitive, kernels)
    speculating = core_of(repetitive, kernels, origin)
    (whole,) = run(plain, [(LOOP * 4, greedy(60, end_token_ids=()))], first_id=1)
    prediction = whole.token_ids if origin == "prediction" else []
    for last in sorted(set(whole.token_ids), key=whole.token_ids.index)[:8]:
        for name in ("end_token_ids", "stop_token_ids"):
            sampling = greedy(60, **{"end_token_ids": (), name: (last,)})
            (expected,) = run(plain, [(LOOP * 4, sampling)], first_id=2)
            (found,) = run(speculating, [(LOOP * 4, sampling)], first_id=2, prediction=prediction)
            assert found == expected or found.num_cached_tokens != expected.num_cached_tokens
            assert (found.token_ids, found.finish_reason) == (expected.token_ids, expected.finish_reason)


class _Poisoned:
    """A runner that cannot compute one token as a guess: it fails, or what it gives for that step are no numbers."""

    def __init__(self, runner: ModelRunner, token_id: int, way: str) -> None:
        self._runner = runner
        self._token_id = token_id
        self._way = way
        self.num_failures = 0

    def run(self, batch: Batch) -> Tensor:
        logits = self._runner.run(batch)
        if not any(self._token_id in scheduled.draft_token_ids for scheduled in batch):
            return logits
        self.num_failures += 1
        if self._way == "fails":
            raise RuntimeError("a kernel that has not this one")
        return torch.full_like(logits, torch.nan)

    def forget(self, sequence: Sequence) -> None:
        self._runner.forget(sequence)


@pytest.mark.parametrize("way", ["fails", "gives no numbers"])
def test_a_guess_that_cannot_be_computed_ends_no_answer(way: str, repetitive: Path) -> None:
    loaded = loaded_from(repetitive, "torch")
    request = (LOOP * 3, greedy(max_tokens=40, end_token_ids=()))
    (expected,) = run(build_core(loaded, None), [request])
    poison = next(token_id for token_id in range(loaded.num_token_ids) if token_id not in expected.token_ids)
    runner = _Poisoned(loaded.runner, poison, way)
    core = build_core(dataclasses.replace(loaded, runner=runner), None)
    (found,) = run(core, [request], prediction=[*expected.token_ids[:9], poison, *expected.token_ids[9:]])
    assert runner.num_failures >= 1
    assert found == expected
    assert core.stats().num_kept_draft_tokens > 0


@pytest.mark.parametrize("origin", ORIGINS)
def test_in_company_drafts_give_way(origin: str, repetitive: Path, like_it: Path) -> None:
    plain = core_of(repetitive, "torch")
    speculating = core_of(repetitive, "torch", origin, like_it)
    prediction = LOOP * 8 if origin == "prediction" else []
    expected, found = run(plain, requests()), run(speculating, requests(), prediction=prediction)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    assert [r.logprobs for r in found] == [r.logprobs for r in expected]


def test_a_model_that_is_its_own_draft_is_always_right(repetitive: Path) -> None:
    """Greedy and sampled alike: the guesses are drawn with the noise that the answer is drawn with."""
    core = core_of(repetitive, "torch", "draft")
    for temperature in (0.0, 0.7, 1.5):
        sampling = greedy(40, temperature=temperature, seed=8, end_token_ids=())
        (result,) = run(core, [(LOOP, sampling)], first_id=1)
        assert len(result.token_ids) == 40
    stats = core.stats()
    assert stats.num_kept_draft_tokens == stats.num_draft_tokens > 90


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("seed", range(4))
def test_a_random_life_gives_everyone_his_own_answer(seed: int, kernels: str, repetitive: Path, like_it: Path) -> None:
    """Short of blocks, in chunks, with choices, aborts, predictions good and bad, and lives that go on elsewhere."""
    generator = random.Random(seed)
    plain = core_of(repetitive, kernels)
    origin = ORIGINS[seed % 2]
    loaded = loaded_from(repetitive, kernels, origin, like_it)
    loaded.num_blocks = 160 // loaded.block_size
    object.__setattr__(loaded.limits, "max_num_batched_tokens", 24)
    object.__setattr__(loaded.limits, "max_num_seqs", 6)
    if loaded.draft is not None:
        loaded.draft.num_blocks = 120 // loaded.draft.block_size
        object.__setattr__(loaded.draft.limits, "max_num_batched_tokens", 16)
    core = build_core(loaded, None)
    waiting = []
    for number in range(24):
        temperature = generator.choice([0.0, 0.0, 0.5, 1.0])
        sampling = greedy(
            generator.randrange(1, 40), temperature=temperature, seed=number, num_logprobs=0, end_token_ids=()
        )
        prompt = (LOOP * 9)[number % 5 : number % 5 + generator.randrange(1, 40)]
        choice_index = generator.randrange(3)
        expected = answer(plain, Add(1, choice_index, prompt, sampling))
        prediction = generator.choice([expected.token_ids, edited(expected.token_ids, generator), LOOP * 5, []])
        waiting.append((prompt, sampling, choice_index, prediction, expected))
    results: dict[int, tuple[Result, Result]] = {}
    num_complete = 0
    while waiting or core.has_work:
        if waiting and generator.random() < 0.7:
            prompt, sampling, choice_index, prediction, expected = waiting.pop()
            # Some have begun in an earlier life of the engine.
            begun = expected.token_ids[: generator.randrange(len(expected.token_ids)) if seed > 1 else 0]
            sequence_id = len(results) + 1
            result = Result(token_ids=[*begun], logprobs=expected.logprobs[: len(begun)])
            results[sequence_id] = result, expected
            core.add(Add(sequence_id, choice_index, prompt, sampling, begun, prediction))
        if results and generator.random() < 0.02:
            for output in core.abort([generator.choice([*results])]):
                results[output.sequence_id][0].take(output)
        for output in core.step() if core.has_work else ():
            results[output.sequence_id][0].take(output)
        core.check()
    for result, expected in results.values():
        assert result.num_terminal == 1
        if result.finish_reason is not FinishReason.ABORT:
            num_complete += 1
            assert (result.token_ids, result.logprobs) == (expected.token_ids, expected.logprobs)
    stats = core.stats()
    assert num_complete > 12
    assert stats.num_kept_draft_tokens > 20
    assert stats.num_preemptions > 0


def answer(core: EngineCore, message: Add) -> Result:
    result = Result()
    core.add(message)
    while core.has_work:
        for output in core.step():
            result.take(output)
    return result


@pytest.mark.parametrize("speculate", ["ngram", "draft"])
def test_where_bits_do_not_repeat_nothing_is_guessed(speculate: str, model_directory: ModelDirectory) -> None:
    directory = model_directory("llama")
    draft = str(directory) if speculate == "draft" else None
    loaded = load_from(directory, speculate=speculate, draft_model=draft, deterministic=False)
    assert loaded.limits.max_draft_rows == 0
    assert loaded.draft is None
    (result,) = run(build_core(loaded, None), [(LOOP, greedy())], prediction=LOOP)
    assert result.finish_reason is not None


def test_the_next_life_has_as_much_memory_for_both(repetitive: Path) -> None:
    """It is told what both pools took together, and none of them gets smaller by that."""
    settings = {"kernels": "torch", "dtype": "float32", "speculate": "draft", "draft_model": str(repetitive)}
    first = load_from(repetitive, **settings, kv_cache_memory=1 << 21)
    again = load_from(repetitive, **settings, kv_cache_memory=first.ready.kv_cache_memory)
    assert first.draft is not None
    assert again.draft is not None
    assert first.ready.kv_cache_memory <= 1 << 21
    assert 0 < first.draft.num_blocks < first.num_blocks
    assert (again.num_blocks, again.draft.num_blocks) == (first.num_blocks, first.draft.num_blocks)
