"""A model directory that the whole server can serve: tiny random weights and a small real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from support import tiny_models
from support.tiny_tokenizers import add_start_token, byte_level, save_model


def save_servable(
    directory: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, width: int | None = None
) -> Path:
    """Weights of that architecture with a byte-level tokenizer and a chat template. `width` is the hidden size."""
    backend = add_start_token(byte_level())
    save_model(directory, backend)
    model = tiny_models.build(architecture, dtype, vocab_size=backend.get_vocab_size(), width=width)
    ends = [backend.token_to_id("</s>"), backend.token_to_id("<|im_end|>")]
    model.generation_config.eos_token_id = ends
    model.generation_config.bos_token_id = backend.token_to_id("<s>")
    model.config.eos_token_id = ends[0]
    model.config.bos_token_id = backend.token_to_id("<s>")
    model.save_pretrained(directory)
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == ends
    return directory
