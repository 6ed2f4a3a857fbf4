"""The promise at the engine: tokens and log-probabilities have the same bits in every circumstance.

Compared with `==`, never with a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reprise.engine import attention, execution, experts, loader, model_runner, repeatability
from reprise.engine.core import EngineCore
from reprise.engine.gate import paged_gate
from reprise.engine.native.library import built_variants
from reprise.errors import ModelLoadError
from reprise.ipc.messages import Add
from reprise.types import SamplingParams
from support import tiny_models
from support.engine_driver import Result, build_core, drain, load_from
from support.one_order import need_products_that_do_not_repeat

DENSE = ["llama", "qwen3", "mistral-window", "gemma2", "gemma3", "gpt-neox", "gpt2", "phi3"]
EXPERTS = ["mixtral", "qwen3-moe", "qwen2-moe", "granitemoe", "deepseek-v3", "gpt-oss"]
NUM_TOKENS = {"paged": 8, "padded": 6}
PROMPT_LENGTHS = {"paged": (1, 9, 26, 131, 150, 40), "padded": (1, 9, 26, 67, 71, 40)}
NATIVE = ["llama", "qwen3", "mistral-window"]
CUDA = ["llama", "qwen3", "mistral-window"]
ModelDirectory = Callable[[str], Path]


@dataclass(frozen=True)
class Choice:
    """One choice of a request, and what of it was delivered before the engine was started."""

    prompt: list[int]
    sampling: SamplingParams
    choice_index: int = 0
    delivered: Result | None = None


def choices(tier: str) -> list[Choice]:
    """Greedy and sampled, penalties and masks; prompts longer and shorter than blocks, key blocks and windows."""
    generator = torch.Generator().manual_seed(11)
    parameters: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "num_prompt_logprobs": 3},
        {"temperature": 1.3, "top_k": 30, "presence_penalty": 0.5},
        {"temperature": 1.0, "min_p": 0.02, "frequency_penalty": 0.4, "logit_bias": {9: 2.0}, "num_prompt_logprobs": 0},
        {"temperature": 0.9, "typical_p": 0.9, "min_tokens": 5, "end_token_ids": (3,)},
    ]
    made = []
    for index, length in enumerate(PROMPT_LENGTHS[tier]):
        prompt = torch.randint(4, tiny_models.VOCAB_SIZE, (length,), generator=generator).tolist()
        values = {"seed": index, "max_tokens": NUM_TOKENS[tier], "num_logprobs": 4}
        made.append(Choice(prompt, SamplingParams(**{**values, **parameters[index]})))
    # Further choices of the second request: the same prompt and seed, told apart by their index.
    return made + [replace(made[1], choice_index=choice_index) for choice_index in (1, 2)]


def run(core: EngineCore, wanted: list[Choice], first_id: int) -> list[Result]:
    """All at once, until all have ended."""
    results = {}
    for sequence_id, choice in enumerate(wanted, first_id):
        before = choice.delivered or Result()
        result = Result(before.token_ids[:], before.logprobs[:], before.prompt_logprobs)
        results[sequence_id] = result
        core.add(Add(sequence_id, choice.choice_index, choice.prompt, choice.sampling, before.token_ids[:]))
    drain(core, results)
    return list(results.values())


def exact(results: list[Result]) -> list[list[object]]:
    """Everything that a client could see, to the bit. Messages hold pairs as lists or tuples: as lists here."""

    def plain(entries: list[Any]) -> list[object]:
        return [entry and [entry.token_id, entry.logprob, [list(pair) for pair in entry.top]] for entry in entries]

    return [[r.token_ids, plain(r.logprobs), plain(r.prompt_logprobs or []), r.finish_reason] for r in results]


def circumstances(
    directory: Path, dtype: str, tier: str, kernels: str = "torch", *, passes_check: bool = True
) -> dict[str, list[Result]]:
    """The same choices, computed in every way that the engine has."""
    wanted = choices(tier)

    def core(num_tokens: int | None = None, **config: Any) -> EngineCore:
        loaded = load_from(directory, dtype=dtype, kernels=kernels, **{"kv_cache_memory": 1 << 25, **config})
        assert loaded.ready.tier == tier, loaded.ready.tier_reason
        assert loaded.ready.deterministic is passes_check, loaded.ready.deterministic_reason
        loaded.num_blocks = num_tokens // loaded.block_size if num_tokens else loaded.num_blocks
        return build_core(loaded, None)

    if tier == "padded":

        def ways(**config: Any) -> EngineCore:
            return core(deterministic=True, **config)
    else:
        ways = core
    plain = ways()
    found = {"alone": [run(plain, [choice], 100 + i)[0] for i, choice in enumerate(wanted)]}
    found["together"] = run(ways(prefix_cache=False), wanted, 1)
    found["together in reverse"] = run(plain, wanted[::-1], 200)[::-1]
    # Room for the first four as they begin, and not as they end.
    scarce = ways(num_tokens=208 if kernels == "native" else 184)
    found["preempted"] = run(scarce, wanted, 1)
    assert scarce.stats().num_preemptions
    delivered = [
        Result(r.token_ids[: 2 + i % 4], r.logprobs[: 2 + i % 4], r.prompt_logprobs)
        for i, r in enumerate(found["alone"])
    ]
    after = [replace(choice, delivered=before) for choice, before in zip(wanted, delivered, strict=True)]
    found["continued after a restart"] = run(ways(), after, 1)
    without = [replace(c, sampling=replace_sampling(c.sampling, use_cache=False)) for c in wanted]
    found["without cache"] = run(ways(), without, 1)
    if tier == "paged":
        found["warm prefix cache"] = [run(plain, [choice], 300 + i)[0] for i, choice in enumerate(wanted)]
        assert any(result.num_cached_tokens for result in found["warm prefix cache"])
        found["chunks of 7"] = run(core(prefix_cache=False, max_num_batched_tokens=7, max_num_seqs=6), wanted, 1)
        found["chunks of 64, blocks of 16"] = run(core(max_num_batched_tokens=64, block_size=16), wanted, 1)
    else:
        found["a few tokens a step"] = run(ways(max_num_seqs=2), wanted, 1)
    return found


def replace_sampling(sampling: SamplingParams, **changes: Any) -> SamplingParams:
    return SamplingParams(**{name: getattr(sampling, name) for name in sampling.__struct_fields__} | changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "tier", "kernels"),
    [
        *((name, "paged", "torch") for name in DENSE + EXPERTS),
        *((name, "paged", "native") for name in NATIVE),
        *((name, "paged", "cuda") for name in CUDA),
        *((name, "padded", "torch") for name in tiny_models.PADDED),
    ],
)
def test_the_same_bits_in_every_circumstance(
    name: str, tier: str, kernels: str, dtype: str, wide_directory: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "cuda":
        # On the CPU it has another attention and no graphs; everything around them is the same.
        monkeypatch.setattr(loader, "choose_execution", execution.cuda_paged)
        kernels = "auto"
    if kernels == "native" and not built_variants():
        pytest.skip("the native decoder was not built: there was no compiler, or this CPU has none of its instructions")
    ways = circumstances(wide_directory(name), dtype, tier, kernels)
    found = {how: exact(results) for how, results in ways.items()}
    alone = found["alone"]
    assert len({str(tokens) for tokens, *_ in alone}) > 4
    for how, results in found.items():
        for index, (result, expected) in enumerate(zip(results, alone, strict=True)):
            assert result == expected, f"choice {index} {how}"


def by_torch(query: Any, keys: Any, values: Any, visible: Any, *, scale: float, **_: Any) -> Any:  # torch's types
    """The same attention by torch's own routine, whose order of summation follows its shapes."""
    group = (-1, query.shape[1], -1, -1)
    return torch.nn.functional.scaled_dot_product_attention(
        query, keys[:, None].expand(group), values[:, None].expand(group), attn_mask=visible, scale=scale
    ).float()


def test_an_attention_without_fixed_order_is_found(
    wide_directory: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_products_that_do_not_repeat()
    monkeypatch.setattr(attention, "attend", by_torch)
    results = circumstances(wide_directory("llama"), "float32", "paged", passes_check=False)
    found = {how: exact(of_way) for how, of_way in results.items()}
    assert any(of_way != found["alone"] for of_way in found.values())


class TestStartUpCheck:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe"])
    def test_finds_torchs_attention(
        self, name: str, dtype: str, wide_directory: ModelDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        need_products_that_do_not_repeat()
        if name == "gemma2":  # its soft cap is none that torch has
            monkeypatch.setattr(attention, "KEY_BLOCK", 64)
            monkeypatch.setattr(attention, "ROW_MULTIPLE", 1)
        else:
            monkeypatch.setattr(attention, "attend", by_torch)
        ready = load_from(wide_directory(name), dtype=dtype).ready
        assert not ready.deterministic
        assert "attention of a token differs" in ready.deterministic_reason

    @pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
    def test_finds_steps_that_are_not_filled_up(
        self, name: str, wide_directory: ModelDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        need_products_that_do_not_repeat()
        monkeypatch.setattr(model_runner, "ROW_MULTIPLE", 1)
        ready = load_from(wide_directory(name), dtype="float32").ready
        assert not ready.deterministic
        assert "logits in chunks differ from those of the prompt alone by up to" in ready.deterministic_reason

    @pytest.mark.parametrize("name", EXPERTS)
    def test_finds_experts_whose_rows_are_not_filled_up(
        self, name: str, wide_directory: ModelDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        need_products_that_do_not_repeat()
        monkeypatch.setattr(experts, "ROW_MULTIPLE", 1)
        assert not load_from(wide_directory(name), dtype="float32").ready.deterministic

    def test_finds_experts_that_it_could_not_reach(self) -> None:
        """As a class that runs its experts in its own way."""
        need_products_that_do_not_repeat()
        model = tiny_models.build("mixtral", width=320)
        own = model.config._experts_implementation
        shapes = paged_gate(model).shapes
        assert repeatability.check_paged(model, shapes, 256, fixed_order=True).passed
        model.set_experts_implementation(own)
        assert not repeatability.check_paged(model, shapes, 256, fixed_order=True).passed

    def test_finds_a_forward_that_is_no_function_of_its_input(self) -> None:
        model = tiny_models.build("falcon")
        assert repeatability.check_alone(model, 256).passed
        calls = []

        def drift(_module: Any, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return output * (1 + len(calls) * 1e-6)

        model.get_output_embeddings().register_forward_hook(drift)  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        found = repeatability.check_alone(model, 256)
        assert not found.passed
        assert "in company" in found.reason

    @pytest.mark.parametrize(("name", "max_model_len"), [("llama", 1), ("llama", 16), ("falcon", 1), ("mamba", 3)])
    def test_a_model_of_few_positions_is_checked_as_far_as_it_goes(
        self, name: str, max_model_len: int, wide_directory: ModelDirectory
    ) -> None:
        ready = load_from(wide_directory(name), max_model_len=max_model_len, deterministic=True, block_size=1).ready
        assert ready.deterministic, ready.deterministic_reason

    def test_fingerprints_tell_weights_and_number_formats_apart(self, wide_directory: ModelDirectory) -> None:
        found = [
            load_from(wide_directory(name), dtype=dtype).ready.numerics_fingerprint
            for name in ("llama", "qwen3", "falcon") for dtype in ("float32", "bfloat16", "float32")
        ]  # fmt: skip
        assert all(len(bytes.fromhex(fingerprint)) == 8 for fingerprint in found)
        assert found[0::3] == found[2::3]
        assert len(set(found)) == 6


class TestSetting:
    def test_asked_for_and_not_to_be_had_is_refused_with_the_cause_and_what_to_do(
        self, wide_directory: ModelDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        need_products_that_do_not_repeat()
        monkeypatch.setattr(attention, "attend", by_torch)
        with pytest.raises(ModelLoadError, match=r"--deterministic was asked for.*attention of a token.*--tier padded"):
            load_from(wide_directory("llama"), deterministic=True)
        assert load_from(wide_directory("llama"), deterministic=True, tier="padded").ready.deterministic

    def test_turned_off_it_is_torchs_own_attention_and_no_more_rows_than_tokens(
        self, wide_directory: ModelDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise AssertionError("the fixed order was used")

        monkeypatch.setattr(attention, "attend", fail)
        monkeypatch.setattr(experts, "fixed_order_experts", fail)
        loaded = load_from(wide_directory("mixtral"), dtype="float32", deterministic=False)
        assert (loaded.ready.tier, loaded.ready.deterministic) == ("paged", False)
        assert loaded.ready.deterministic_reason == "turned off"
        results = run(build_core(loaded, None), choices("paged"), 1)
        assert all(len(result.token_ids) > 1 for result in results)

    @pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "mistral-window", "llama"])
    def test_turned_off_the_greedy_answers_are_the_same_in_float32(
        self, name: str, wide_directory: ModelDirectory
    ) -> None:
        """Soft caps and sinks stay ours, windows become torch's: the sums differ in their last bits alone."""
        greedy = choices("paged")[:1]
        on, off = (
            run(build_core(load_from(wide_directory(name), dtype="float32", deterministic=asked), None), greedy, 1)[0]
            for asked in (True, False)
        )
        assert on.token_ids == off.token_ids

    def test_the_padded_tier_repeats_only_where_asked(self, wide_directory: ModelDirectory) -> None:
        unset, off, on = (
            load_from(wide_directory("falcon"), deterministic=asked).ready for asked in (None, False, True)
        )
        assert (unset.deterministic, off.deterministic, on.deterministic) == (False, False, True)
        assert "--deterministic" in unset.deterministic_reason
        assert off.deterministic_reason == "turned off"
