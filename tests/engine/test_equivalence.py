"""The engine against `model.generate`: the same greedy tokens, alone and in company, with the cache and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from reprise.types import SamplingParams
from support import tiny_models
from support.engine_driver import build_core, greedy, load_from, run

ModelDirectory = Callable[[str], Path]
COMPARED = [name for name in tiny_models.CONFIGS if name not in {"phi3-longrope", "llama-dynamic"}]
NUM_TOKENS = 12


def prompts() -> list[list[int]]:
    """Ragged: shorter and longer than the windows, the blocks and the chunks."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(4, tiny_models.VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in (1, 5, 13, 22, 8)
    ]


def generated(directory: Path) -> list[list[int]]:
    """The oracle: transformers' own generate, one prompt at a time, up to an end token."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    outputs = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            pad_token_id=0,
        )
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.parametrize("name", COMPARED)
def test_greedy_output_equals_generate(name: str, model_directory: ModelDirectory) -> None:
    directory = model_directory(name)
    expected = generated(directory)
    assert len({tuple(tokens) for tokens in expected}) > 1
    # A budget of 16 tokens cuts the prompts of the paged tier into chunks.
    loaded = load_from(directory, max_num_batched_tokens=16, max_num_seqs=8)
    assert loaded.ready.tier == ("padded" if name in tiny_models.PADDED else "paged"), loaded.ready.tier_reason
    core = build_core(loaded, None)
    cached, recomputed = greedy(NUM_TOKENS), greedy(NUM_TOKENS, use_cache=False)

    alone = [run(core, [(prompt, cached)])[0].token_ids for prompt in prompts()]
    together = run(core, [(prompt, cached) for prompt in prompts()], first_id=100)
    without_cache = run(core, [(prompt, recomputed) for prompt in prompts()], first_id=200)
    mixed = run(
        core,
        [(prompt, (cached, recomputed)[i % 2]) for i, prompt in enumerate(prompts())]
        + [(prompts()[3], SamplingParams(seed=5, max_tokens=30, top_p=0.9))],
        first_id=300,
    )

    assert alone == expected
    assert [r.token_ids for r in together] == expected
    assert [r.token_ids for r in without_cache] == expected
    assert [r.token_ids for r in mixed[:-1]] == expected
    assert all(r.num_cached_tokens == 0 for r in without_cache)


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_a_request_joins_and_leaves_at_any_step(name: str, model_directory: ModelDirectory) -> None:
    from reprise.ipc.messages import Add
    from support.engine_driver import Result, drain

    directory = model_directory(name)
    expected = generated(directory)
    core = build_core(load_from(directory, max_num_batched_tokens=16, max_num_seqs=8), None)
    results: dict[int, Result] = {}
    for index, prompt in enumerate(prompts()):
        results[index] = Result()
        core.add(Add(index, 0, prompt, greedy(NUM_TOKENS)))
        for output in core.step():
            results[output.sequence_id].take(output)
        if index == 2:
            for output in core.abort([1]):
                results[output.sequence_id].take(output)
    drain(core, results)
    assert results[1].finish_reason == "abort"
    assert results[1].token_ids == expected[1][: len(results[1].token_ids)]
    assert [results[i].token_ids for i in (0, 2, 3, 4)] == [expected[i] for i in (0, 2, 3, 4)]


@pytest.mark.parametrize("name", ["llama", "gemma3", "mamba"])
def test_preemption_changes_no_token(name: str, model_directory: ModelDirectory) -> None:
    directory = model_directory(name)
    long = [(prompt, greedy(40, end_token_ids=())) for prompt in prompts()]
    plenty = build_core(load_from(directory), None)
    loaded = load_from(directory)
    loaded.num_blocks = 20
    scarce = build_core(loaded, None)
    expected = [result.token_ids for result in run(plenty, long)]
    assert [result.token_ids for result in run(scarce, long)] == expected
    assert plenty.stats().num_preemptions == 0
    assert scarce.stats().num_preemptions > 0


def test_a_cached_prefix_changes_no_token_and_is_counted(model_directory: ModelDirectory) -> None:
    core = build_core(load_from(model_directory("llama")), None)
    prompt = prompts()[3]
    first, second = (run(core, [(prompt, greedy())], first_id=i)[0] for i in (1, 2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == (len(prompt) - 1) // 4 * 4
    assert second.token_ids == first.token_ids


def test_choices_of_one_step_share_the_prompt(model_directory: ModelDirectory) -> None:
    core = build_core(load_from(model_directory("llama")), None)
    prompt = prompts()[3]
    first, second = run(core, [(prompt, greedy()), (prompt, greedy())])
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, (len(prompt) - 1) // 4 * 4)
    assert first.token_ids == second.token_ids


@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic"])
def test_a_long_neighbour_does_not_change_a_short_requests_logits(name: str, model_directory: ModelDirectory) -> None:
    """Rope factors that follow the longest position of a batch are frozen at load (M14)."""
    length = 200 if name == "phi3-longrope" else 120
    loaded = load_from(model_directory(name), max_model_len=250)
    assert loaded.ready.tier == "paged", loaded.ready.tier_reason
    core = build_core(loaded, None)
    short = (prompts()[1], greedy(6, num_logprobs=3))
    long = ([5 + i % 190 for i in range(length)], greedy(6))
    alone = run(core, [short])[0]
    beside = run(core, [short, long], first_id=10)[0]
    assert beside.token_ids == alone.token_ids
    for a, b in zip(alone.logprobs, beside.logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
