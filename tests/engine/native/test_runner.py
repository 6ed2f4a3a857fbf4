"""The native decoder against the models it stands for: the same logits, and bits that no company changes."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from reprise.engine.native.decoder import BLOCK, NativeDecoder, Quantization, unsupported
from reprise.engine.native.library import NativeContext, built_variants
from reprise.engine.native.runner import NativeRunner
from reprise.engine.scheduler import ScheduledSequence
from reprise.engine.sequence import Sequence
from reprise.types import SamplingParams
from support.engine_driver import load_from

SHAPE: dict[str, Any] = {
    "vocab_size": 301, "hidden_size": 96, "intermediate_size": 208, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
CONFIGS: dict[str, tuple[Any, int | None]] = {
    "llama": (transformers.LlamaConfig(**SHAPE), None),
    "llama, tied, heads of 80": (transformers.LlamaConfig(**SHAPE, head_dim=80, tie_word_embeddings=True), None),
    "llama, one query a key": (transformers.LlamaConfig(**{**SHAPE, "num_key_value_heads": 6}), None),
    "mistral, window": (transformers.MistralConfig(**SHAPE, sliding_window=50), 50),
    "mistral, window, heads of 32": (transformers.MistralConfig(**SHAPE, head_dim=32, sliding_window=50), 50),
    "qwen2": (transformers.Qwen2Config(**SHAPE), None),
    "qwen2, 9 heads of 80": (
        transformers.Qwen2Config(**{**SHAPE, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 80}),
        None,
    ),
    "qwen3": (transformers.Qwen3Config(**{**SHAPE, "intermediate_size": 224}, head_dim=64), None),
}
DTYPES = [torch.float32, torch.bfloat16]


def build(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """In float32 with weights that bfloat16 holds exactly, then in `dtype`."""
    torch.manual_seed(7)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[name][0], attn_implementation="eager")  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.07) if parameter.dim() > 1 else parameter.normal_(1.0, 0.2)
            parameter.copy_(parameter.bfloat16().float())
    built: PreTrainedModel = model.to(dtype).eval()
    return built


def runner_of(
    model: PreTrainedModel,
    window: int | None,
    *,
    threads: int = 2,
    block_size: int = BLOCK,
    variant: str | None = None,
    quantize: Quantization = "none",
) -> NativeRunner:
    assert not unsupported(model, quantize)
    windows = [window] * SHAPE["num_hidden_layers"]
    context = NativeContext(threads, variant)
    decoder = NativeDecoder(model, windows, num_blocks=64, max_positions=512, context=context, quantize=quantize)
    return NativeRunner(decoder, block_size)


def sequence_of(index: int, token_ids: list[int], block_ids: list[int]) -> Sequence:
    sampling = SamplingParams(seed=0, max_tokens=0, num_prompt_logprobs=0)
    sequence = Sequence(index, choice_index=0, prompt_token_ids=token_ids, sampling=sampling)
    sequence.block_ids = block_ids
    return sequence


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator).tolist()
    return ids


def rows(runner: NativeRunner, *parts: tuple[Sequence, int, int]) -> torch.Tensor:
    return runner.run([ScheduledSequence(sequence, start, end - start) for sequence, start, end in parts]).clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("variant", built_variants())
def test_its_logits_are_the_models(name: str, dtype: torch.dtype, variant: str) -> None:
    ids = prompt(200, 1)
    model = build(name, dtype)
    with torch.inference_mode():
        expected = build(name, torch.float32)(torch.tensor([ids])).logits[0]
        own = model(torch.tensor([ids])).logits[0].float()
    runner = runner_of(model, CONFIGS[name][1], variant=variant)
    actual = rows(runner, (sequence_of(1, ids, list(range(20))), 0, 200))
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    if dtype == torch.float32:
        assert error.max() < 1e-5
    else:
        # Nearer to float32 than the model's own forward in bfloat16.
        assert error.mean() < 0.9 * ((own - expected).norm(dim=-1) / expected.norm(dim=-1)).mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "quantize"),
    [*((name, "none") for name in CONFIGS), ("qwen3", "int8"), ("qwen3", "int4"), ("llama, tied, heads of 80", "int8")],
)
@pytest.mark.parametrize("variant", built_variants())
def test_a_rows_bits_do_not_depend_on_its_company(
    name: str, quantize: Quantization, dtype: torch.dtype, variant: str
) -> None:
    model, window = build(name, dtype), CONFIGS[name][1]
    ids, other = prompt(200, 1), prompt(90, 2)
    whole = runner_of(model, window, variant=variant, quantize=quantize)
    alone = rows(whole, (sequence_of(1, ids, list(range(20))), 0, 200))
    for threads, block_size in ((1, BLOCK), (2, 2 * BLOCK), (5, BLOCK)):
        runner = runner_of(model, window, threads=threads, block_size=block_size, variant=variant, quantize=quantize)
        mine = sequence_of(1, ids, list(range(30, 14, -1)))
        found = []
        for start, end in ((0, 1), (1, 3), (3, 16), (16, 17), (17, 60), (60, 129), (129, 130), (130, 200)):
            # Blocks that held something else before, and a neighbour of another length in front at each step.
            neighbour = sequence_of(start + 2, other, list(range(8)))
            both = rows(runner, (neighbour, 0, 90 - start % 7), (mine, start, end))
            found.append(both[90 - start % 7 :])
        assert torch.equal(torch.cat(found), alone), f"{threads} threads"


def test_a_chunk_in_the_midst_of_a_prompt_has_no_logits() -> None:
    runner = runner_of(build("llama", torch.float32), None)
    sequence = Sequence(
        1, choice_index=0, prompt_token_ids=prompt(40, 5), sampling=SamplingParams(seed=0, max_tokens=1)
    )
    sequence.block_ids = [0, 1, 2]
    assert rows(runner, (sequence, 0, 20)).shape == (0, SHAPE["vocab_size"])
    assert rows(runner, (sequence, 20, 40)).shape == (1, SHAPE["vocab_size"])


KEPT = [("llama", dtype, 16) for dtype in DTYPES] + [("qwen3", torch.bfloat16, 64)]
"""Models by the way of their attention, with the size of their heads."""


def keys_of(runner: NativeRunner, head_dim: int) -> list[torch.Tensor]:
    """And values, layer by layer."""
    found = [kept for kept in runner._decoder._kept if kept.numel() == 64 * BLOCK * 2 * head_dim]
    assert len(found) == 2 * SHAPE["num_hidden_layers"]
    return found


@pytest.mark.parametrize(("name", "dtype", "head_dim"), KEPT)
def test_what_a_block_held_before_is_not_seen(name: str, dtype: torch.dtype, head_dim: int) -> None:
    """Not even where it is no number."""
    model = build(name, dtype)
    ids = prompt(37, 3)
    expected = rows(runner_of(model, None), (sequence_of(1, ids, [0, 1, 2]), 0, 37))
    runner = runner_of(model, None)
    for kept in keys_of(runner, head_dim):
        kept.fill_(float("nan"))
    assert torch.equal(rows(runner, (sequence_of(1, ids, [0, 1, 2]), 0, 37)), expected)


@pytest.mark.skipif("amx" not in built_variants(), reason="this CPU has no matrix unit")
def test_the_matrix_unit_is_shared_with_torch() -> None:
    """Both set it up for this thread as they need it, and neither disturbs the other."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(48, 64, generator=generator).bfloat16() for _ in range(2))
    ids = prompt(70, 1)
    with torch.inference_mode():
        expected = functional.linear(x, weight)
        runner = runner_of(build("qwen3", torch.bfloat16), None, threads=1, variant="amx")
        logits = rows(runner, (sequence_of(1, ids, list(range(8))), 0, 70))
        for _ in range(3):
            assert torch.equal(functional.linear(x, weight), expected)
            assert torch.equal(rows(runner, (sequence_of(1, ids, list(range(8))), 0, 70)), logits)


@pytest.mark.skipif("amx" not in built_variants(), reason="this CPU has no matrix unit")
@pytest.mark.parametrize(("name", "dtype", "same"), [("qwen3", torch.bfloat16, False), ("qwen3", torch.float32, True)])
def test_only_bfloat16_is_multiplied_in_the_matrix_unit(name: str, dtype: torch.dtype, *, same: bool) -> None:
    """Whose order of summation shows that it was used."""
    model, ids = build(name, dtype), prompt(70, 1)
    tiles, vectors = (
        rows(runner_of(model, None, variant=variant), (sequence_of(1, ids, list(range(8))), 0, 70))
        for variant in ("amx", "avx512bf16")
    )
    assert torch.equal(tiles, vectors) is same


def test_released_weights_are_not_needed() -> None:
    model = build("qwen3", torch.bfloat16)
    ids = prompt(20, 4)
    expected = rows(runner_of(model, None), (sequence_of(1, ids, [0, 1]), 0, 20))
    windows = [None] * SHAPE["num_hidden_layers"]
    decoder = NativeDecoder(model, windows, num_blocks=8, max_positions=64, context=NativeContext(1), release=True)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1) == 0
    assert torch.equal(rows(NativeRunner(decoder, BLOCK), (sequence_of(1, ids, [0, 1]), 0, 20)), expected)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2), "type gpt2"),
        (transformers.LlamaConfig(**SHAPE, hidden_act="gelu"), "activation gelu"),
        (transformers.LlamaConfig(**SHAPE, attention_bias=True), "biases"),
        (transformers.LlamaConfig(**SHAPE, mlp_bias=True), "biases"),
        (transformers.LlamaConfig(**SHAPE, head_dim=24), "multiples of 16"),
    ],
)
def test_what_it_cannot_run_it_names(config: Any, word: str) -> None:
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]  # as above
    assert word in unsupported(model)


def test_other_types_stay_with_torch() -> None:
    assert "float16 on cpu" in unsupported(build("llama", torch.float16))


@pytest.mark.parametrize("block_size", [BLOCK, 2 * BLOCK])
def test_what_the_decoder_has_not_is_refused(block_size: int) -> None:
    """By the library itself, before it reads or writes anything there."""
    runner = runner_of(build("llama", torch.float32), None, block_size=block_size)
    num_blocks = 64 * BLOCK // block_size
    longer = [1] * (block_size + 1)
    rows(runner, (sequence_of(1, longer, [0, num_blocks - 1]), 0, len(longer)))
    for token_ids, block_ids in (
        ([1, SHAPE["vocab_size"]], [0]),
        ([1, -1], [0]),
        (longer, [0]),
        (longer, [0, num_blocks]),
        (longer, [0, -1]),
        ([1] * 513, list(range(num_blocks))),
    ):
        with pytest.raises(IndexError, match="embeddings"):
            rows(runner, (sequence_of(1, token_ids, block_ids), 0, len(token_ids)))


def test_short_of_memory_is_an_error_and_passes() -> None:
    """More work space than there is: no end of the process, and the next step runs."""
    runner = runner_of(build("llama", torch.float32), None)
    ids = prompt(500, 6)
    sequence = sequence_of(1, ids, list(range(32)))
    expected = rows(runner_of(build("llama", torch.float32), None), (sequence, 0, 500))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    chunk = Sequence(2, choice_index=0, prompt_token_ids=ids, sampling=SamplingParams(seed=0, max_tokens=1))
    chunk.block_ids = sequence.block_ids
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 24), hard))
    try:
        with pytest.raises(MemoryError):
            runner.run([ScheduledSequence(chunk, 0, 499)] * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert torch.equal(rows(runner, (sequence, 0, 500)), expected)


@pytest.mark.parametrize(("name", "dtype", "head_dim"), KEPT)
def test_what_is_no_number_stays_none(name: str, dtype: torch.dtype, head_dim: int) -> None:
    """Keys that are no numbers, with sound values: whoever sees them has no numbers either."""
    model = build(name, dtype)
    runner = runner_of(model, None)
    ids = prompt(40, 8)
    sequence = sequence_of(1, ids, [0, 1, 2])
    rows(runner, (sequence, 0, 39))
    keys_of(runner, head_dim)[0][: BLOCK * head_dim].fill_(float("nan"))
    assert torch.isnan(rows(runner, (sequence, 39, 40))).any()


def test_prompts_of_the_gate_may_be_longer_than_the_context(tmp_path: Path) -> None:
    config = transformers.MistralConfig(**SHAPE, sliding_window=300)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]  # as above
    model.save_pretrained(tmp_path)
    for max_model_len in (16, 64, 256):
        loaded = load_from(tmp_path, kernels="auto", max_model_len=max_model_len, max_num_seqs=2)
        assert loaded.ready.kernels.startswith("native")
        assert loaded.ready.deterministic
