from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizer

from reprise.errors import ModelLoadError
from reprise.text.model_files import read_model_json
from reprise.text.tokenizer import Tokenizer
from support.tiny_tokenizers import CORPUS, add_start_token, byte_level, characters, save_model

USER = [{"role": "user", "content": "Hi!"}]


@pytest.mark.parametrize("text", [*CORPUS[:4], "", " ", "<|im_end|>x"])
def test_ids_equal_those_of_transformers(tokenizer: Tokenizer, text: str) -> None:
    for add_special_tokens in (True, False):
        expected = tokenizer._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        assert tokenizer.encode(text, add_special_tokens=add_special_tokens) == expected


def test_decode_equals_transformers(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode(CORPUS[0], add_special_tokens=True)
    for skip in (True, False):
        expected = tokenizer._tokenizer.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(token_ids, skip_special_tokens=skip) == expected


def test_unknown_ids_decode_to_nothing(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.decode([-1, 10**9], skip_special_tokens=True) == ""


def test_start_token_is_added_where_asked(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.bos_token_id is not None
    plain = byte_tokenizer.encode("fox", add_special_tokens=False)
    assert byte_tokenizer.encode("fox", add_special_tokens=True) == [byte_tokenizer.bos_token_id, *plain]


def test_truncation_of_the_file_is_off(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.load(str(save_model(tmp_path, backend)))
    assert len(tokenizer.encode("x" * 100, add_special_tokens=False)) > 8
    assert len(tokenizer.encode("x", add_special_tokens=False)) == 1


def test_threads_share_a_tokenizer(byte_tokenizer: Tokenizer) -> None:
    def work(n: int) -> list[int]:
        byte_tokenizer.encode_chat([{"role": "user", "content": f"<|im_end|> {n}"}], add_generation_prompt=True)
        return byte_tokenizer.encode(CORPUS[n % 4] * 50, add_special_tokens=bool(n % 2))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(64)))
    assert found == [work(n) for n in range(64)]


def test_other_threads_run_while_a_long_text_is_encoded(byte_tokenizer: Tokenizer) -> None:
    text = " ".join(str(n) for n in range(150_000))
    started, longest_gap = time.perf_counter(), 0.0
    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(byte_tokenizer.encode, text, add_special_tokens=False)
        last, done = started, False
        while not done:
            done, now = encoding.done(), time.perf_counter()
            longest_gap, last = max(longest_gap, now - last), now
    assert longest_gap < 0.5 * (time.perf_counter() - started)


@pytest.mark.parametrize(
    ("files", "ends", "start"),
    [
        ({}, (4,), [1]),
        ({"generation_config": {"eos_token_id": 2}}, (2, 4), [1]),
        ({"generation_config": {"eos_token_id": [2, 3, 4]}}, (2, 3, 4), [1]),
        ({"config": {"eos_token_id": 3}}, (3, 4), [1]),
        ({"config": {"text_config": {"eos_token_id": 3}}}, (3, 4), [1]),
        ({"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": 2}}, (2, 4), [1]),
        ({"bos_token": None}, (4,), [4]),
        ({"bos_token": None, "generation_config": {"bos_token_id": 3}}, (4,), [3]),
        ({"bos_token": None, "eos_token": None}, (), []),
    ],
)
def test_end_and_start_tokens(tmp_path: Path, files: dict[str, Any], ends: tuple[int, ...], start: list[int]) -> None:
    tokenizer = Tokenizer.load(str(save_model(tmp_path, byte_level(), **files)))
    assert tokenizer.end_token_ids == ends
    assert tokenizer.start_token_ids == start
    assert tokenizer.bos_token_id == (start[0] if start and start != list(ends) else None)


def test_generation_defaults_are_the_numbers_that_are_set(tmp_path: Path) -> None:
    config = {"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True, "min_p": True, "max_length": 9}
    tokenizer = Tokenizer.load(str(save_model(tmp_path, byte_level(), generation_config=config)))
    assert tokenizer.generation_defaults == {"temperature": 0.6, "top_k": 20}


@pytest.mark.parametrize("content", ["{", "[1]", b"\xff\xfe"])
def test_broken_configuration_names_its_file(tmp_path: Path, content: str | bytes) -> None:
    directory = save_model(tmp_path, byte_level())
    data = content if isinstance(content, bytes) else content.encode()
    (directory / "generation_config.json").write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"generation_config\.json"):
        Tokenizer.load(str(directory))


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"There is no directory '.*nothing'"):
        Tokenizer.load(str(tmp_path / "nothing"))


def test_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelLoadError, match=r"holds no tokenizer.*tokenizer\.json"):
        Tokenizer.load(str(tmp_path))


def test_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match="is a file"):
        Tokenizer.load(str(path))


def test_broken_tokenizer_gives_the_reason(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ModelLoadError, match=r"cannot be loaded: Expecting property name"):
        Tokenizer.load(str(tmp_path))


def test_hub_cache_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository in the cache serves its files; one that it lacks counts as missing."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot = repository / "snapshots" / ("a" * 40)
    save_model(snapshot, byte_level(), generation_config={"eos_token_id": 2, "top_p": 0.9})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    assert read_model_json("org/tiny", "generation_config.json") == {"eos_token_id": 2, "top_p": 0.9}
    assert read_model_json("org/tiny", "config.json") == {}
    assert read_model_json("org/other", "config.json") == {}


def test_code_of_a_repository_is_not_run(tmp_path: Path) -> None:
    directory = save_model(tmp_path, byte_level(), auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (directory / "evil.py").write_text("raise SystemExit('ran')")
    Tokenizer.load(str(directory))


def test_character_tokenizer_round_trip(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(save_model(tmp_path, add_start_token(characters()), chat_template=None)))
    token_ids = tokenizer.encode("The fox", add_special_tokens=False)
    assert len(token_ids) == 7
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "The fox"
    assert not tokenizer.has_chat_template


def test_wraps_a_transformers_tokenizer(tmp_path: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(str(save_model(tmp_path, byte_level())))
    tokenizer = Tokenizer(loaded, chat_template="{{ messages[0].content }}")
    assert tokenizer.render_chat(USER, add_generation_prompt=True) == "Hi!"


class _PythonTokenizer(PreTrainedTokenizer):
    """A tokenizer without the Rust backend, as some old repositories have them."""

    vocab_files_names = {"vocab_file": "vocab.txt"}  # noqa: RUF012 # as transformers declares it

    def __init__(self, **options: Any) -> None:
        tokens = ["<unk>", "</s>", *map(chr, range(32, 127))]
        self._ids = {token: i for i, token in enumerate(tokens)}
        self._tokens = tokens
        super().__init__(**options)  # type: ignore[no-untyped-call]  # transformers annotates none

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return self._ids | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def test_tokenizer_written_in_python() -> None:
    wrapped = _PythonTokenizer(unk_token="<unk>", eos_token="</s>")
    tokenizer = Tokenizer(wrapped, chat_template="{{ messages[0].content }}</s>")
    token_ids = tokenizer.encode("Hi</s>", add_special_tokens=False)
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "Hi"
    assert token_ids[-1:] == list(tokenizer.end_token_ids) == [1]
    assert tokenizer.vocabulary.exact
    assert tokenizer.vocabulary.data(token_ids[0]) == b"H"
    assert tokenizer.vocabulary.special_token_ids == {0, 1}
    assert tokenizer.encode_chat(USER, add_generation_prompt=True)[-1] == 1


def test_the_fingerprint_of_one_written_in_python_changes_with_its_tokens_and_its_files(tmp_path: Path) -> None:
    def fingerprint(data: str = "a", name: str = "vocab.txt", **options: Any) -> str:
        path = tmp_path / name
        path.write_text(data)
        wrapped = _PythonTokenizer(**({"unk_token": "<unk>", "eos_token": "</s>", "vocab_file": str(path)} | options))
        return Tokenizer(wrapped).fingerprint

    assert fingerprint(name="elsewhere.txt") == fingerprint()
    found = [fingerprint(), fingerprint("b"), fingerprint(eos_token="a"), fingerprint(extra_special_tokens=["<x>"])]
    assert len(set(found)) == len(found)
