"""The size of the KV pool: what its memory holds, and no more than can be used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from reprise.engine.kv_cache import LayerShape
from reprise.engine.memory import kv_budget
from reprise.errors import ModelLoadError
from reprise.ipc.messages import EngineConfig

PADDED_BYTES_PER_TOKEN_FALLBACK = 4096


@dataclass(frozen=True, slots=True)
class Pool:
    """The KV pool's size."""

    num_blocks: int
    block_size: int
    bytes_per_token: int

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


def size_pool(
    config: EngineConfig, bytes_per_token: int, max_model_len: int, device: torch.device, block_size: int | None = None
) -> Pool:
    """What the memory budget holds, and no more than all sequences can use at their longest."""
    block_size = block_size or config.block_size
    budget = config.kv_cache_memory
    if budget is None:
        budget = kv_budget(device, config.gpu_memory_utilization)
    useful = config.max_num_seqs * (-(-max_model_len // block_size)) * block_size
    tokens = min(budget // bytes_per_token, useful)
    smallest = max(block_size, min(max_model_len, 2 * block_size))
    if tokens < smallest:
        raise ModelLoadError(
            f"a KV pool of {budget} bytes holds {tokens} tokens at {bytes_per_token} bytes a token, fewer than the"
            f" {smallest} it takes to serve: raise --kv-cache-memory"
        )
    return Pool(tokens // block_size, block_size, bytes_per_token)


def paged_bytes_per_token(shapes: dict[nn.Module, LayerShape]) -> int:
    """All layers together."""
    return sum(shape.bytes_per_token for shape in shapes.values())


def padded_bytes_per_token(model: PreTrainedModel) -> int:
    """An estimate for models whose cache transformers keeps: two vectors of the hidden size in every layer."""
    text = model.config.get_text_config()
    layers, hidden = getattr(text, "num_hidden_layers", 0), getattr(text, "hidden_size", 0)
    return 2 * layers * hidden * model.dtype.itemsize or PADDED_BYTES_PER_TOKEN_FALLBACK
