"""What keeps a model from our own decoders is named."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from reprise.engine.llama_family import differs

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def build(config: transformers.PreTrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    return model


@pytest.mark.parametrize("make", [transformers.LlamaConfig, transformers.MistralConfig, transformers.Qwen3Config])
def test_models_of_the_family(make: Any) -> None:
    assert not differs(build(make(**SHAPE)))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (transformers.StableLmConfig(**SHAPE), "models of type stablelm"),
        (transformers.LlamaConfig(**SHAPE, hidden_act="gelu"), "activation gelu"),
        (transformers.LlamaConfig(**SHAPE, attention_bias=True), "biases"),
        (transformers.LlamaConfig(**SHAPE, mlp_bias=True), "biases"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_others(config: transformers.PreTrainedConfig, named: str) -> None:
    assert named in differs(build(config))


def test_heads_of_which_a_part_is_rotated() -> None:
    model: Any = build(transformers.LlamaConfig(**SHAPE))
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:4]
    assert differs(model) == "heads of which a part is rotated"
