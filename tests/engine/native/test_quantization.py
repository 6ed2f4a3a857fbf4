"""Weights of eight and of four bits: what is computed is what the rounded weights say."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from reprise.engine.native.decoder import BLOCK, NativeDecoder, Quantization, unsupported
from reprise.engine.native.library import NativeContext, built_variants
from reprise.engine.native.runner import NativeRunner
from reprise.engine.scheduler import ScheduledSequence
from reprise.engine.sequence import Sequence
from reprise.errors import ModelLoadError
from reprise.types import SamplingParams
from support.engine_driver import load_from

SHAPE: dict[str, Any] = {
    "vocab_size": 301, "hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
NUM_TOKENS = 150


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(11)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.07) if parameter.dim() > 1 else parameter.normal_(1.0, 0.2)
    built: PreTrainedModel = model.eval()
    return built


def eight_bits(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return (weight / scale).round().clamp(-127, 127) * scale


def four_bits(weight: Tensor) -> Tensor:
    groups = weight.reshape(weight.shape[0], -1, 32)
    furthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (furthest / -8).bfloat16().float()
    return ((groups / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)


def rows_of_eight_bits(rows: Tensor) -> Tensor:
    """What rows become before they are multiplied: eight bits, and a scale for each 32 neighbours."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 32))
    groups = padded.reshape(*rows.shape[:-1], -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    rounded_groups: Tensor = (groups / scale.clamp(min=1e-30)).round() * scale
    return rounded_groups.reshape(padded.shape)[..., : rows.shape[-1]]


def rounded(model: PreTrainedModel, of_layers: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """The model with the weights that quantisation leaves, as plain numbers, and its rows rounded as well."""
    copy: Any = deepcopy(model)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if parameter.dim() > 1:
                way = eight_bits if "embed" in name or "lm_head" in name else of_layers
                parameter.copy_(way(parameter))
    for module in copy.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (rows_of_eight_bits(inputs[0]),))
    result: PreTrainedModel = copy
    return result


def logits(model: PreTrainedModel, ids: list[int], quantize: Quantization, variant: str) -> Tensor:
    windows = [None] * SHAPE["num_hidden_layers"]
    context = NativeContext(2, variant)
    decoder = NativeDecoder(model, windows, num_blocks=16, max_positions=256, context=context, quantize=quantize)
    scoring = SamplingParams(seed=0, max_tokens=0, num_prompt_logprobs=0)
    sequence = Sequence(1, choice_index=0, prompt_token_ids=ids, sampling=scoring)
    sequence.block_ids = list(range(12))
    return NativeRunner(decoder, BLOCK).run([ScheduledSequence(sequence, 0, len(ids))]).clone()


def errors(found: Tensor, expected: Tensor) -> Tensor:
    """Of each token, the first first."""
    distances: Tensor = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return distances


@pytest.mark.parametrize("variant", built_variants())
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("quantize", "way", "intermediate"),
    [("int8", eight_bits, 224), ("int8", eight_bits, 208), ("int4", four_bits, 224)],
)
def test_it_computes_what_rounded_weights_say(
    quantize: Quantization, way: Callable[[Tensor], Tensor], variant: str, intermediate: int, *, tied: bool
) -> None:
    """A number here and there is rounded the other way after another order of sums; what follows differs by that."""
    shape = SHAPE | {"intermediate_size": intermediate}
    model = build(transformers.LlamaConfig(**shape, tie_word_embeddings=tied))
    ids = torch.randint(0, 301, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    found = logits(model, ids, quantize, variant)
    with torch.inference_mode():
        of_rounded = rounded(model, way)(torch.tensor([ids])).logits[0]
        own = model(torch.tensor([ids])).logits[0]
    assert errors(found, of_rounded)[:5].max() < 1e-6
    assert errors(found, of_rounded).max() < 0.05
    assert errors(found, own)[:5].min() > 1e-3, "nothing was rounded"


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_what_is_no_number_stays_none(quantize: Quantization) -> None:
    model = build(transformers.LlamaConfig(**SHAPE))
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = float("nan")
        model.get_parameter("model.layers.0.input_layernorm.weight")[3] = float("nan")
    assert torch.isnan(logits(model, [1, 2, 3], quantize, built_variants()[0])).all()


def test_sizes_that_do_not_fit_are_named() -> None:
    model = build(transformers.LlamaConfig(**{**SHAPE, "intermediate_size": 208}))
    assert not unsupported(model, "int8")
    assert "multiples of 32" in unsupported(model, "int4")


def test_what_cannot_be_quantised_is_refused_by_name(tmp_path: Path) -> None:
    build(transformers.LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "llama")
    with pytest.raises(ModelLoadError, match=r"--quantize int8 .* --kernels torch was asked for"):
        load_from(tmp_path / "llama", kernels="torch", quantize="int8")
    with pytest.raises(ModelLoadError, match=r"--quantize int4 .* --tier padded"):
        load_from(tmp_path / "llama", kernels="auto", tier="padded", quantize="int4")
    gpt2: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    )
    gpt2.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelLoadError, match="no models of type gpt2"):
        load_from(tmp_path / "gpt2", kernels="auto", quantize="int8")


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantised_model_passes_the_checks_of_a_start(tmp_path: Path, quantize: Quantization) -> None:
    build(transformers.LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    ready = load_from(tmp_path, kernels="auto", quantize=quantize).ready
    assert ready.kernels.split(", ")[::2] == ["native", quantize]
    assert ready.deterministic
