"""The promise at the engine: tokens and log-probabilities have the same bits in every circumstance.

Compared with `==`, never with a tolerance. Mixtures of experts are here in bfloat16 alone: an expert gets as many rows
as the company sends it, and in float32 the number of rows shows in a row's bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reprise.engine import attention
from reprise.types import SamplingParams
from support import tiny_models
from support.engine_driver import Result, build_core, load_from, run

MODELS = ["llama", "qwen3", "mistral-window", "gemma2", "gemma3", "gpt-neox", "gpt2", "phi3"]
CASES = [
    *((name, dtype) for name in MODELS for dtype in ("float32", "bfloat16")),
    *((name, "bfloat16") for name in ("mixtral", "qwen3-moe", "gpt-oss")),
]
NUM_TOKENS = 24
Requests = list[tuple[list[int], SamplingParams]]


@pytest.fixture(scope="module")
def wide_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models wide enough for the kernels of real ones: with 32 columns every product is summed in one order."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("wide") / name
            tiny_models.build(name, width=320).save_pretrained(made[name])
        return made[name]

    return get


def requests(*, use_cache: bool = True) -> Requests:
    """Greedy and sampled, penalties and masks; prompts longer and shorter than blocks, key blocks and windows."""
    generator = torch.Generator().manual_seed(11)
    parameters: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2},
        {"temperature": 1.3, "top_k": 30, "presence_penalty": 0.5},
        {"temperature": 1.0, "min_p": 0.02, "frequency_penalty": 0.4, "logit_bias": {9: 2.0}},
        {"temperature": 0.9, "typical_p": 0.9, "min_tokens": 5, "end_token_ids": (3,)},
    ]
    made = []
    for index, length in enumerate((1, 9, 26, 131, 150, 40)):
        prompt = torch.randint(4, tiny_models.VOCAB_SIZE, (length,), generator=generator).tolist()
        values = {"seed": index, "max_tokens": NUM_TOKENS, "num_logprobs": 4, "use_cache": use_cache}
        made.append((prompt, SamplingParams(**{**values, **parameters[index]})))
    return made


def exact(results: list[Result]) -> list[list[object]]:
    """Everything that a client could see, to the bit. Messages hold pairs as lists or tuples: as lists here."""
    return [
        [r.token_ids, [[e.token_id, e.logprob, [list(pair) for pair in e.top]] for e in r.logprobs]] for r in results
    ]


def circumstances(directory: Path, dtype: str) -> dict[str, list[Result]]:
    """The same requests, computed in every way that the engine has."""

    def core(**config: Any) -> Any:  # the engine core, untyped for brevity
        loaded = load_from(directory, dtype=dtype, **{"kv_cache_memory": 1 << 25, **config})
        assert loaded.ready.tier == "paged", loaded.ready.tier_reason
        return build_core(loaded, None)

    plain = core()
    found = {"alone": [run(plain, [r], first_id=i)[0] for i, r in enumerate(requests())]}
    found["warm prefix cache"] = [run(plain, [r], first_id=100 + i)[0] for i, r in enumerate(requests())]
    assert any(result.num_cached_tokens for result in found["warm prefix cache"])
    found["together"] = run(core(prefix_cache=False), requests())
    found["chunks of 7"] = run(core(prefix_cache=False, max_num_batched_tokens=7, max_num_seqs=6), requests())
    found["chunks of 64, blocks of 16"] = run(core(max_num_batched_tokens=64, block_size=16), requests())
    found["without cache"] = run(core(), requests(use_cache=False))
    loaded = load_from(directory, dtype=dtype, kv_cache_memory=1 << 25)
    loaded.num_blocks = 64
    scarce = build_core(loaded, None)
    found["preempted"] = run(scarce, requests())
    assert scarce.stats().num_preemptions
    return found


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_same_bits_in_every_circumstance(name: str, dtype: str, wide_directory: Callable[[str], Path]) -> None:
    found = {how: exact(results) for how, results in circumstances(wide_directory(name), dtype).items()}
    for how, results in found.items():
        for index, (result, alone) in enumerate(zip(results, found["alone"], strict=True)):
            assert result == alone, f"request {index} {how}"


def test_an_attention_without_fixed_order_is_found(
    wide_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same attention by torch's own routine, whose order of summation follows its shapes, must fail the test."""

    def attend(query: Any, keys: Any, values: Any, visible: Any, *, scale: float, **_: Any) -> Any:  # torch's types
        heads = query.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys[:, None].expand(-1, heads, -1, -1), values[:, None].expand(-1, heads, -1, -1),
            attn_mask=visible, scale=scale,
        ).float()  # fmt: skip

    monkeypatch.setattr(attention, "attend", attend)
    found = {how: exact(results) for how, results in circumstances(wide_directory("llama"), "float32").items()}
    assert any(results != found["alone"] for results in found.values())
