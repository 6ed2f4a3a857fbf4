"""The gate of the native decoder: what it compares with, and that it lets through nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from reprise.engine.decoder_gate import NativeGate, native_layers_gate
from reprise.engine.native.decoder import BLOCK, NativeDecoder
from reprise.engine.native.library import NativeContext
from reprise.engine.native.runner import NativeRunner
from support import tiny_models

NAMES = ["llama", "qwen3", "mistral-window", "llama-dynamic"]
DTYPES = [torch.float32, torch.bfloat16]
WIDTH = 64


def build(name: str, dtype: torch.dtype) -> PreTrainedModel:
    return tiny_models.build(name, dtype, width=WIDTH)


def difference(gate: NativeGate, model: PreTrainedModel, windows: list[int | None] | None = None) -> str:
    decoder = NativeDecoder(
        model, windows or gate.windows, num_blocks=16, max_positions=64, context=NativeContext(1)
    )  # fmt: skip
    return gate.difference(NativeRunner(decoder, BLOCK))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_models_of_the_family_pass_and_are_left_as_they_were(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        before = model(ids).logits
    gate = NativeGate(model)
    assert gate.mismatch() == ""
    assert gate.windows == [getattr(model.config, "sliding_window", None)] * model.config.num_hidden_layers
    assert {(s.num_key_value_heads, s.key_dim, s.value_dim, s.dtype) for s in gate.shapes.values()} == {
        (2, 16, 16, dtype)
    }
    assert native_layers_gate(model, gate.windows) == ""
    assert difference(gate, model) == ""
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_compared_with_are_those_of_the_same_weights_in_float32(name: str) -> None:
    model = build(name, torch.bfloat16)
    gate = NativeGate(model)
    wide: Any = build(name, torch.bfloat16).float()  # type: ignore[no-untyped-call]  # a decorated method
    for prompt, logits in zip(gate._prompts, gate._expected, strict=True):
        with torch.inference_mode():
            expected = wide(torch.tensor([prompt])).logits[0]
        assert logits.dtype == torch.float32
        assert (logits - expected).norm() < 1e-5 * expected.norm()


def scaled(model: Any) -> None:
    model.model.layers[-1].mlp.down_proj.weight.data *= 1.5


def rows_exchanged(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0)


def norm_scaled(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight.data *= 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [scaled, rows_exchanged, norm_scaled])
def test_another_weight_in_any_layer_is_found(change: Callable[[Any], None], dtype: torch.dtype) -> None:
    gate, model = NativeGate(build("llama", dtype)), build("llama", dtype)
    change(model)
    assert "differ" in difference(gate, model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lost_window_is_found(dtype: torch.dtype) -> None:
    model = build("mistral-window", dtype)
    gate = NativeGate(model)
    assert "differ" in native_layers_gate(model, [None, None])
    assert "differ" in difference(gate, model, [None, None])


def test_a_window_longer_than_the_prompts_is_found_by_its_name() -> None:
    model = build("llama", torch.float32)
    model.config.sliding_window = 4096
    assert "sliding windows" in NativeGate(model).mismatch()


def test_a_layer_that_does_not_come_to_the_attention_function_is_found() -> None:
    model: Any = build("llama", torch.float32)

    class Silent(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
            return torch.zeros_like(hidden_states), None

    model.model.layers[1].self_attn = Silent()
    assert "came to us 1 times in a forward of 2 layers" in NativeGate(model).mismatch()
