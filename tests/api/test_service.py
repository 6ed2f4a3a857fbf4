from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reprise.api.service import Service
from reprise.ipc.messages import Ready
from reprise.replay import facts
from reprise.settings import Settings
from reprise.text.tokenizer import Tokenizer
from support.scripted_engine import READY, ScriptedEngine
from support.tiny_tokenizers import add_start_token, byte_level, save_model


def of_service(tokenizer: Tokenizer, info: Ready = READY, **settings: Any) -> str:
    """The fingerprint of a server's responses."""
    service = Service(Settings(**settings), tokenizer, ScriptedEngine(tokenizer))
    service.close()
    return service.fingerprint(info)


@pytest.mark.parametrize(
    "change",
    [
        {"weights_fingerprint": "x"},
        {"model_config_fingerprint": "x"},
        {"tier": "padded"},
        {"kernels": "native, avx2"},
        {"device_name": "x"},
        {"dtype": "bfloat16"},
        {"max_model_len": 7},
        {"max_sequence_tokens": 7},
        {"deterministic": False},
        {"numerics_fingerprint": "x"},
    ],
    ids=str,
)
def test_the_fingerprint_changes_with_what_is_loaded(tokenizer: Tokenizer, change: dict[str, Any]) -> None:
    assert of_service(tokenizer, msgspec.structs.replace(READY, **change)) != of_service(tokenizer)


@pytest.mark.parametrize("change", [{"load_seconds": 9.0}, {"tier_reason": "x"}, {"max_num_seqs": 3}], ids=str)
def test_the_fingerprint_stays_where_answers_do(tokenizer: Tokenizer, change: dict[str, Any]) -> None:
    assert of_service(tokenizer, msgspec.structs.replace(READY, **change)) == of_service(tokenizer)


@pytest.mark.parametrize("library", ["torch", "transformers", "tokenizers", "jinja2", "reprise"])
def test_the_fingerprint_changes_with_versions(
    tokenizer: Tokenizer, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, version = of_service(tokenizer), metadata.version
    facts.software.cache_clear()
    monkeypatch.setattr(metadata, "version", lambda name: "0" if name == library else version(name))
    if library == "reprise":
        monkeypatch.setattr(facts, "__version__", "0")
    assert of_service(tokenizer) != before
    facts.software.cache_clear()


def model(
    directory: Path, *, merges: int | None = None, starts: bool = True, token: str | None = None, **files: Any
) -> Tokenizer:
    """A tokenizer of some files. merges: how many are left. starts: with `<s>`. token: one that is added."""
    backend = add_start_token(byte_level()) if starts else byte_level()
    if token is not None:
        backend.add_tokens([token])
    save_model(directory, backend, **files)
    if merges is not None:
        path = directory / "tokenizer.json"
        description = json.loads(path.read_text())
        del description["model"]["merges"][merges:]
        path.write_text(json.dumps(description))
    return Tokenizer.load(str(directory))


@pytest.mark.parametrize(
    "change",
    [
        {"merges": -1},
        {"starts": False},
        {"token": "fox"},
        {"bos_token": "<|im_start|>"},
        {"generation_config": {"eos_token_id": [2, 4]}},
        {"config": {"eos_token_id": 2}},
        {"bos_token": None, "config": {"bos_token_id": 3}},
        {"chat_template": "{{ messages[0].content }}"},
        {"chat_template": None},
        {"generation_config": {"temperature": 0.5}},
    ],
    ids=str,
)
def test_the_fingerprint_changes_with_the_files_of_the_model(tmp_path: Path, change: dict[str, Any]) -> None:
    before, same = (of_service(model(tmp_path / name)) for name in ("a", "b"))
    assert before == same
    assert of_service(model(tmp_path / "c", **change)) != before


def test_the_fingerprint_changes_with_the_settings_that_prompts_and_defaults_follow_from(tmp_path: Path) -> None:
    directory = str(save_model(tmp_path, byte_level(), generation_config={"temperature": 0.5}))
    own, other = Tokenizer.load(directory), Tokenizer.load(directory, chat_template="{{ messages[0].content }}")
    found = [of_service(own), of_service(own, generation_defaults="openai"), of_service(other)]
    assert len(set(found)) == 3
