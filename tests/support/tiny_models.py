"""Tiny random-weight models of the real architectures: a few thousand parameters, the real code paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 199
EOS_TOKEN_ID = 3

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 2,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
}
_LLAMA = {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 2}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**_LLAMA, head_dim=8),
    "phi3": lambda: transformers.Phi3Config(**_LLAMA),
    "phi3-longrope": lambda: transformers.Phi3Config(
        **_LLAMA, rope_parameters=dict(_LONGROPE), original_max_position_embeddings=64
    ),
    "llama-dynamic": lambda: transformers.LlamaConfig(
        **{**_LLAMA, "max_position_embeddings": 64}, rope_parameters=dict(_DYNAMIC)
    ),
    "mistral-window": lambda: transformers.MistralConfig(**_LLAMA, sliding_window=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **_LLAMA, head_dim=8, sliding_window=8, query_pre_attn_scalar=8, attn_logit_softcapping=5.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**_LLAMA, "num_hidden_layers": 3}, head_dim=8, sliding_window=8, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**_COMMON, intermediate_size=64),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=256,
        bos_token_id=2, eos_token_id=EOS_TOKEN_ID,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **_LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        **_LLAMA, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, shared_expert_intermediate_size=48
    ),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **{**_LLAMA, "num_key_value_heads": 4}, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=3,
        n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=12,
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **_LLAMA, head_dim=8, sliding_window=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=2, eos_token_id=EOS_TOKEN_ID, max_position_embeddings=256,
    ),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4, bos_token_id=2, eos_token_id=EOS_TOKEN_ID
    ),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, state_size=8,
        bos_token_id=2, eos_token_id=EOS_TOKEN_ID, pad_token_id=0,
    ),
    "mamba2": lambda: transformers.Mamba2Config(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16,
        n_groups=1, chunk_size=8, bos_token_id=2, eos_token_id=EOS_TOKEN_ID, pad_token_id=0,
    ),
}  # fmt: skip

PAGED = [name for name in CONFIGS if name not in {"falcon", "bloom", "mamba", "mamba2"}]
PADDED = ["falcon", "bloom", "mamba", "mamba2"]


def _widen(config: Any, width: int) -> None:
    config.hidden_size = width
    if config.model_type == "mamba":
        config.intermediate_size = config.expand * width
    elif config.model_type == "mamba2":
        config.head_dim = config.expand * width // config.num_heads
    elif config.model_type not in {"falcon", "bloom", "deepseek_v3"}:
        config.head_dim = width // config.num_attention_heads


def build(
    name: str, dtype: torch.dtype = torch.float32, vocab_size: int = VOCAB_SIZE, width: int | None = None
) -> PreTrainedModel:
    """A model of that architecture with weights large enough that its greedy choices differ from step to step.

    `width` replaces the hidden size of those that take one (a multiple of 32).
    """
    torch.manual_seed(len(name) * 7919 + sum(map(ord, name)))
    config = CONFIGS[name]()
    config.vocab_size = vocab_size
    if width is not None:
        _widen(config, width)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.25 * (32 / (width or 32)) ** 0.5)
    built: PreTrainedModel = model.to(dtype).eval()
    return built
