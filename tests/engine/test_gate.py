"""The gate lets through what is equal and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from reprise.engine import attention
from reprise.engine.gate import padding_gate, paged_gate
from support import tiny_models


@pytest.mark.parametrize("name", tiny_models.PAGED)
def test_models_of_the_attention_interface_pass(name: str) -> None:
    result = paged_gate(tiny_models.build(name))
    assert result.passed, result.reason
    assert len(result.shapes) >= 2


@pytest.mark.parametrize("name", tiny_models.PADDED)
def test_models_outside_it_are_found_and_padding_leaves_them_alone(name: str) -> None:
    model = tiny_models.build(name)
    result = paged_gate(model)
    assert not result.passed
    assert result.reason
    assert padding_gate(model).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_passes_with_its_own_tolerance(dtype: torch.dtype) -> None:
    result = paged_gate(tiny_models.build("llama", dtype))
    assert result.passed, result.reason


PagedAttention = Callable[..., tuple[Tensor, None]]


def broken(change: dict[str, Any]) -> PagedAttention:
    """Our attention function with one of its arguments lost or wrong."""

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return attention.paged_attention(module, *args, **{**kwargs, **change})

    return attend


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"scaling": 0.9}),
        ("gemma2", {"softcap": None}),
        ("gemma2", {"sliding_window": None}),
        ("mistral-window", {"sliding_window": None}),
        ("gpt-oss", {"s_aux": None}),
    ],
)
def test_an_attention_that_loses_something_does_not_pass(
    name: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.build(name)
    assert paged_gate(model).passed
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.ATTENTION_NAME, broken(change))
    result = paged_gate(model)
    assert not result.passed
    assert model.config._attn_implementation == "eager"


def test_a_window_longer_than_the_gates_prompts_is_found_by_its_name() -> None:
    """The model ignores a window that its configuration has: its logits would differ far beyond the gate."""
    model = tiny_models.build("llama")
    model.config.sliding_window = 4096
    assert "sliding windows" in paged_gate(model).reason


def test_a_strange_layer_type_does_not_pass() -> None:
    model = tiny_models.build("llama")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert "chunked_attention" in paged_gate(model).reason


def test_an_attention_that_is_handed_something_unknown_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    function = broken({"position_bias": torch.zeros(1)})
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.ATTENTION_NAME, function)
    assert "position_bias" in paged_gate(tiny_models.build("llama")).reason


@pytest.mark.parametrize("window", [8, 64])
def test_padding_that_is_not_inert_is_found_whatever_the_window(window: int) -> None:
    model = tiny_models.build("mistral-window")
    model.config.sliding_window = window
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    assert padding_gate(model).passed
    forward = model.forward

    def without_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return forward(
            *args, attention_mask=None if attention_mask is None else torch.ones_like(attention_mask), **kwargs
        )

    model.forward = without_mask
    assert not padding_gate(model).passed
    assert padding_gate(model, padding_is_inert=False).passed
