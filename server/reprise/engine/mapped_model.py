"""A model over its files as they are mapped into memory: nothing is copied, converted or renamed."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

PLAIN_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Models whose files name the tensors as their modules do."""
_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose weights are memory that is not taken yet: to be replaced."""
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    empty: PreTrainedModel = model.eval()
    return empty


def map_model(name: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel | None:
    """The model of a directory or hub id, in main memory.

    None where its files are not all there, or are not exactly the model: transformers loads it then, or says why not.
    """
    directory = _directory(name, config)
    if directory is None or config.model_type not in PLAIN_TYPES or hasattr(config, "quantization_config"):
        return None
    if (directory / "adapter_config.json").exists():
        return None
    try:
        tensors = _tensors(directory)
    except Exception:  # noqa: BLE001 # whatever is wrong with the files, transformers will name it
        return None
    model = empty_model(deepcopy(config), dtype)
    wanted = model.state_dict()
    if tensors.keys() - wanted.keys():
        return None
    if any(tensor.shape != wanted[key].shape or tensor.dtype != dtype for key, tensor in tensors.items()):
        return None
    model.load_state_dict(tensors, strict=False, assign=True)
    missing = wanted.keys() - tensors.keys()
    # As transformers does with what it has loaded: weights that differ in the files stay apart. Afterwards nothing is
    # missing that is one with a weight of the files.
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    return None if missing else model


def _directory(name: str, config: PreTrainedConfig) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    commit: Any = getattr(config, "_commit_hash", None)
    cached = try_to_load_from_cache(name, "config.json", revision=commit) if commit else None
    return Path(cached).parent if isinstance(cached, str) else None


def _tensors(directory: Path) -> dict[str, Tensor]:
    if (directory / _FILE).exists():
        names = [_FILE]
    else:
        # Sorted, as transformers reads them: of a tensor in several files the last one counts.
        names = sorted(set(json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        with safe_open(directory / name, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 # it is no mapping
    return tensors
