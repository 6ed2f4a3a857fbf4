"""What the decoders of our own have in common: the models of the Llama family."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def differs(model: PreTrainedModel) -> str:
    """What of this model a decoder of the family does not have, as in «it has no …»; empty where it is one of them."""
    config: Any = model.config
    if config.model_type not in MODEL_TYPES:
        return f"models of type {config.model_type}"
    if config.hidden_act not in ("silu", "swish"):
        return f"activation {config.hidden_act}"
    parts: Any = model.model
    attention, mlp = parts.layers[0].self_attn, parts.layers[0].mlp
    if any(linear.bias is not None for linear in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        return "biases behind attention and in the feed-forward network"
    device = model.device
    positions = torch.zeros(1, 1, dtype=torch.int64, device=device)
    if parts.rotary_emb(torch.zeros(1, device=device), positions)[0].shape[-1] != attention.head_dim:
        return "heads of which a part is rotated"
    return ""
