"""The size of the KV pool."""

from __future__ import annotations

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

from reprise.engine.kv_pool import PADDED_BYTES_PER_TOKEN_FALLBACK, padded_bytes_per_token, size_pool
from reprise.errors import ModelLoadError
from reprise.ipc.messages import EngineConfig

CPU = torch.device("cpu")
BYTES = 100
"""Of a token."""


def config(num_bytes: int, *, max_num_seqs: int = 4, block_size: int = 16) -> EngineConfig:
    return EngineConfig(model="m", kv_cache_memory=num_bytes, max_num_seqs=max_num_seqs, block_size=block_size)


def test_it_holds_the_whole_blocks_that_the_memory_has_room_for() -> None:
    pool = size_pool(config(1000 * BYTES), BYTES, 4096, CPU)
    assert (pool.num_blocks, pool.block_size, pool.num_tokens) == (62, 16, 992)
    assert pool.num_tokens * pool.bytes_per_token <= 1000 * BYTES


def test_blocks_may_be_larger_than_asked_for() -> None:
    pool = size_pool(config(1000 * BYTES), BYTES, 4096, CPU, 64)
    assert (pool.num_blocks, pool.block_size) == (15, 64)


def test_it_is_no_larger_than_every_sequence_at_its_longest() -> None:
    """Of 100 tokens in blocks of 16, of which each takes seven."""
    assert size_pool(config(1 << 40), BYTES, 100, CPU).num_blocks == 4 * 7


@pytest.mark.parametrize(("max_model_len", "smallest"), [(4096, 32), (20, 20), (8, 16)])
def test_less_than_can_be_served_with_is_an_error(max_model_len: int, smallest: int) -> None:
    """As many tokens as two blocks have, or the model's length where that is less, and one block in any case."""
    size_pool(config(smallest * BYTES), BYTES, max_model_len, CPU)
    with pytest.raises(ModelLoadError, match=f"holds {smallest - 1} tokens .* the {smallest} it takes"):
        size_pool(config(smallest * BYTES - 1), BYTES, max_model_len, CPU)


def test_a_share_of_the_memory_where_no_size_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reprise.engine.memory.available_memory", lambda: 1 << 20)
    pool = size_pool(EngineConfig(model="m", block_size=16), BYTES, 1 << 20, CPU)
    assert pool.num_blocks == (1 << 18) // BYTES // 16


def test_bytes_a_token_of_models_whose_cache_transformers_keeps() -> None:
    small = FalconConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=32)
    model = FalconForCausalLM(small)
    assert padded_bytes_per_token(model) == 2 * 3 * 64 * 4
    model.config.num_hidden_layers = 0  # as one that has another name for them
    assert padded_bytes_per_token(model) == PADDED_BYTES_PER_TOKEN_FALLBACK
