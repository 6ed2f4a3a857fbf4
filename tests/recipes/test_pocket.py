"""The bundled model: its files, its tokenizer, its chat template, and the questions that it follows."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipes.pocket.check import BUNDLED, Answerer, follows
from recipes.pocket.questions import PUBLISHED, published, read, write

TOKENIZER: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(BUNDLED, torch.bfloat16)


def test_directory_is_small_and_complete() -> None:
    files = {file.name for file in BUNDLED.iterdir() if file.is_file()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    } <= files
    assert sum(file.stat().st_size for file in BUNDLED.iterdir() if file.is_file()) <= 12_000_000


def test_is_a_plain_llama() -> None:
    config = json.loads((BUNDLED / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["dtype"] == "bfloat16"
    assert "auto_map" not in config


@settings(deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


def test_every_byte_has_a_token() -> None:
    letters = pre_tokenizers.ByteLevel.alphabet()
    assert len(letters) == 256
    assert set(letters) <= TOKENIZER.get_vocab().keys()


def test_begin_is_written_once() -> None:
    begin = TOKENIZER.bos_token_id
    assert TOKENIZER.encode("")[:2] == [begin]
    assert TOKENIZER.encode("Hello").count(begin) == 1
    text = TOKENIZER.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert TOKENIZER.encode(str(text), add_special_tokens=False).count(begin) == 1


def test_chat_template() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello\n"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "你好"},
    ]
    assert TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|begin|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi!<|end|><|user|>你好<|end|><|assistant|>"
    )
    assert TOKENIZER.apply_chat_template(turns[1:2], tokenize=False) == "<|begin|><|user|>Hello<|end|>"
    text = str(TOKENIZER.apply_chat_template(turns[1:2], tokenize=False, add_generation_prompt=True))
    tokens = TOKENIZER.convert_ids_to_tokens(TOKENIZER.encode(text, add_special_tokens=False))
    assert [tokens[0], tokens[1], *tokens[-2:]] == ["<|begin|>", "<|user|>", "<|end|>", "<|assistant|>"]


def test_follows_its_published_questions(answerer: Answerer) -> None:
    asked = read(PUBLISHED)
    answers = answerer.last_answers(asked, None)
    failed = [
        (question.turns, answer)
        for question, answer in zip(asked, answers, strict=True)
        if not follows(question, answer)
    ]
    assert len(failed) <= 0.05 * len(asked), failed


def test_ends_each_turn(answerer: Answerer) -> None:
    prompts = ["<|begin|><|user|>Hello<|end|><|assistant|>", "<|begin|><|user|>asdf qwer<|end|><|assistant|>"]
    assert all(ended for _, ended in answerer.complete(prompts))


def test_continues_plain_text(answerer: Answerer) -> None:
    ((text, _),) = answerer.complete(["<|begin|>The capital of France is"])
    assert "Paris" in text


def test_published_list_is_what_the_recipe_writes(tmp_path: Path) -> None:
    write(published(), tmp_path / "questions.jsonl")
    assert (tmp_path / "questions.jsonl").read_text() == PUBLISHED.read_text()
