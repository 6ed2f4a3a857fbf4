"""A model over its mapped files is the one that transformers would load, or there is none."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from reprise.engine.mapped_model import map_model
from reprise.engine.memory import MappedFiles
from support import tiny_models

ModelDirectory = Callable[[str], Path]


@pytest.fixture
def copy(model_directory: ModelDirectory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_directory("llama"), tmp_path / "model"))


def mapped(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel | None:
    return map_model(str(directory), AutoConfig.from_pretrained(directory), dtype)


def same(directory: Path) -> PreTrainedModel:
    """The mapped model, after a comparison with that of transformers."""
    model, own = mapped(directory), AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    assert model is not None
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, own(ids).logits)
    found, expected = model.state_dict(), own.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert model.config._attn_implementation == "eager"
    assert not model.training
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window", "llama-dynamic"])
def test_it_is_the_model_and_its_weights_are_the_files(name: str, model_directory: ModelDirectory) -> None:
    directory = model_directory(name)
    model = same(directory)
    files = MappedFiles()
    assert all(files.has(parameter) for parameter in model.parameters())
    file = load_file(directory / "model.safetensors")
    for parameter in model.parameters():
        files.give_back(parameter)
    assert all(torch.equal(parameter, file[key]) for key, parameter in model.named_parameters())


def test_weights_in_several_files(copy: Path) -> None:
    model: Any = tiny_models.build("llama")
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="20KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    same(copy)


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def called_tied(copy: Path) -> Path:
    """A model whose configuration says that head and embedding are one, and whose files hold both, which differ."""
    config = copy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    return copy


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(HEAD),
        lambda tensors: tensors.pop(EMBEDDING),
        lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}),
    ],
    ids=["the embedding alone", "the head alone", "both"],
)
def test_tied_weights_are_one(called_tied: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    edit(called_tied, change)
    found: Any = same(called_tied)
    assert found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()


def test_a_head_of_its_own_stays_whatever_the_configuration_says(called_tied: Path) -> None:
    found: Any = same(called_tied)
    assert torch.equal(found.lm_head.weight, load_file(called_tied / "model.safetensors")[HEAD])


def test_neither_of_two_tied_weights_is_left_to_transformers(called_tied: Path) -> None:
    edit(called_tied, lambda tensors: [tensors.pop(HEAD), tensors.pop(EMBEDDING)])
    assert mapped(called_tied) is None


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(NORM),
        lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}),
        lambda tensors: tensors.update({NORM: torch.ones(7)}),
        lambda tensors: tensors.update({NORM: tensors[NORM].half()}),
    ],
    ids=["missing", "unexpected", "misshapen", "another format"],
)
def test_files_that_are_not_exactly_the_model_are_left_to_transformers(
    copy: Path, change: Callable[[dict[str, Tensor]], object]
) -> None:
    edit(copy, change)
    assert mapped(copy) is None


def test_of_a_tensor_that_is_in_several_files_the_last_one_counts(copy: Path) -> None:
    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    names = [f"model-{number:05}-of-00008.safetensors" for number in range(1, 9)]
    for number, name in enumerate(names):
        save_file(tensors | {NORM: torch.full_like(tensors[NORM], number)}, copy / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict(zip(tensors, itertools.cycle(names), strict=False))}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    same(copy)


def test_what_has_to_be_converted_is_left_to_transformers(model_directory: ModelDirectory, copy: Path) -> None:
    assert mapped(model_directory("llama"), torch.bfloat16) is None
    assert mapped(model_directory("gpt2")) is None
    config = copy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "x"}}))
    assert mapped(copy) is None


def test_adapters_are_left_to_transformers(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    assert mapped(copy) is None


def test_files_that_cannot_be_read_are_left_to_transformers(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert mapped(copy) is None
    weights.unlink()
    assert mapped(copy) is None
