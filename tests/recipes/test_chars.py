"""The `chars` preset: a character-level model from a short text."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from recipes.pocket.check import Answerer
from recipes.pocket.tokenizer import character_tokenizer
from recipes.pocket.train import CHARS_TEXT, train_chars

TEXT = CHARS_TEXT.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("chars")
    train_chars(output, TEXT, num_steps=3)
    return output


def test_writes_what_transformers_loads(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    answerer = Answerer(directory, torch.float32)
    assert 0.40e6 < answerer.model.num_parameters() < 0.46e6
    ((text, _),) = answerer.complete(["The little"])
    assert set(text) <= set(TEXT)


def test_one_token_a_character(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(ids) == len(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode(TEXT)[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("text", ["a b  c", "\n\n\t ", "你好，世界。", "e\u0301 \r\n", "'tis “so”"])
def test_any_text_survives_its_own_tokenizer(text: str) -> None:
    tokenizer = character_tokenizer(text)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_an_unseen_character_is_unknown(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.encode("猫", add_special_tokens=False) == [tokenizer.unk_token_id]
