"""Several tokens in one step: the same answers to the last bit, in fewer steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reprise.engine.core import EngineCore
from reprise.engine.native.library import built_variants
from support import tiny_models
from support.engine_driver import Result, build_core, greedy, load_from, run

ModelDirectory = Callable[[str], Path]
LOOP = [5, 9, 13, 21, 34, 55]
KERNELS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(not built_variants(), reason="was not built for this CPU")),
]


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose next token follows nearly from the last alone and is one of few: it soon goes round in circles."""
    directory = tmp_path_factory.mktemp("repetitive")
    model: Any = tiny_models.build("llama", width=320)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(0.02)
        model.get_output_embeddings().weight[12:].mul_(0.1)
    model.save_pretrained(directory)
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


def core_of(directory: Path, kernels: str, speculate: str) -> EngineCore:
    loaded = load_from(
        directory, kernels=kernels, speculate=speculate, dtype="float32", kv_cache_memory=1 << 25, block_size=4
    )
    assert loaded.ready.deterministic
    return build_core(loaded, None)


def one_by_one(core: EngineCore) -> list[Result]:
    return [run(core, [request], first_id=100 + index)[0] for index, request in enumerate(requests())]


@pytest.mark.parametrize("kernels", KERNELS)
def test_answers_are_the_same(kernels: str, repetitive: Path) -> None:
    plain = core_of(repetitive, kernels, "none")
    speculating = core_of(repetitive, kernels, "ngram")
    expected, found = one_by_one(plain), one_by_one(speculating)
    cached = one_by_one(speculating)  # over what the first time left in the prefix cache, drafts' blocks among it
    for index, results in enumerate(zip(expected, found, cached, strict=True)):
        first, *others = ((r.token_ids, r.logprobs, r.prompt_logprobs, r.finish_reason) for r in results)
        assert others == [first, first], f"request {index}"
    stats = speculating.stats()
    assert plain.stats().num_draft_tokens == 0
    assert stats.num_draft_tokens >= stats.num_kept_draft_tokens > 100
    assert stats.num_generated_tokens == 2 * plain.stats().num_generated_tokens
    assert stats.num_steps + stats.num_kept_draft_tokens == 2 * plain.stats().num_steps


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_end_comes_where_it_would_have_come(kernels: str, repetitive: Path) -> None:
    """An end token, or a stop token, within a draft: what would follow it is not said."""
    plain = core_of(repetitive, kernels, "none")
    speculating = core_of(repetitive, kernels, "ngram")
    (whole,) = run(plain, [(LOOP * 4, greedy(60, end_token_ids=()))], first_id=1)
    for last in sorted(set(whole.token_ids), key=whole.token_ids.index)[:8]:
        for name in ("end_token_ids", "stop_token_ids"):
            sampling = greedy(60, **{"end_token_ids": (), name: (last,)})
            (expected,) = run(plain, [(LOOP * 4, sampling)], first_id=2)
            (found,) = run(speculating, [(LOOP * 4, sampling)], first_id=2)
            assert found == expected or found.num_cached_tokens != expected.num_cached_tokens
            assert (found.token_ids, found.finish_reason) == (expected.token_ids, expected.finish_reason)


def test_in_company_drafts_give_way(repetitive: Path) -> None:
    plain = core_of(repetitive, "torch", "none")
    speculating = core_of(repetitive, "torch", "ngram")
    expected, found = run(plain, requests()), run(speculating, requests())
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    assert [r.logprobs for r in found] == [r.logprobs for r in expected]


def test_where_bits_do_not_repeat_nothing_is_guessed(model_directory: ModelDirectory) -> None:
    loaded = load_from(model_directory("llama"), speculate="ngram", deterministic=False)
    assert loaded.limits.max_draft_rows == 0
