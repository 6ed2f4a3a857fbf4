from __future__ import annotations

from importlib import metadata
from typing import Any

import msgspec
import pytest

from reprise.api import service
from reprise.api.service import Service, system_fingerprint
from reprise.settings import Settings
from reprise.text.tokenizer import Tokenizer
from support.scripted_engine import READY, ScriptedEngine


def fingerprint(*, chat_template: str | None = "a", defaults: dict[str, float] | None = None, **facts: Any) -> str:
    info = msgspec.structs.replace(READY, **facts)
    return system_fingerprint(info, chat_template=chat_template, defaults=defaults or {})


@pytest.mark.parametrize(
    "change",
    [
        {"weights_fingerprint": "x"},
        {"tier": "padded"},
        {"device_name": "x"},
        {"dtype": "bfloat16"},
        {"max_model_len": 7},
        {"max_sequence_tokens": 7},
        {"chat_template": "b"},
        {"chat_template": None},
        {"defaults": {"temperature": 0.5}},
    ],
    ids=str,
)
def test_the_fingerprint_changes_with_what_answers_follow_from(change: dict[str, Any]) -> None:
    assert fingerprint(**change) != fingerprint()


@pytest.mark.parametrize("change", [{"load_seconds": 9.0}, {"tier_reason": "x"}, {"max_num_seqs": 3}], ids=str)
def test_the_fingerprint_stays_where_answers_do(change: dict[str, Any]) -> None:
    assert fingerprint(**change) == fingerprint()


@pytest.mark.parametrize("library", ["torch", "transformers", "reprise"])
def test_the_fingerprint_changes_with_versions(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, version = fingerprint(), metadata.version
    service._library_versions.cache_clear()
    monkeypatch.setattr(metadata, "version", lambda name: "0" if name == library else version(name))
    if library == "reprise":
        monkeypatch.setattr(service, "__version__", "0")
    assert fingerprint() != before
    service._library_versions.cache_clear()


def test_the_fingerprint_changes_with_the_setting_of_defaults(tokenizer: Tokenizer) -> None:
    found = set()
    for choice in ("model", "openai"):
        own = Service(Settings(generation_defaults=choice), tokenizer, ScriptedEngine(tokenizer))
        own.tokenizer.generation_defaults["temperature"] = 0.5
        found.add(own.fingerprint(READY, own.served(READY)))
        own.close()
    del tokenizer.generation_defaults["temperature"]
    assert len(found) == 2
