"""The small JSON files of a model, from a directory or the Hugging Face cache."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reprise.errors import ModelLoadError

GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tekken.json", "vocab*", "*.model", "*.tiktoken")


def check_model_place(model: str) -> None:
    """Raise ModelLoadError for a path where no model can be, in plainer words than a hub client has for it."""
    path = Path(model)
    if path.is_dir():
        if not any(found for pattern in _TOKENIZER_FILES for found in path.glob(pattern)):
            raise ModelLoadError(
                f"The directory {model!r} holds no tokenizer: a model directory has a tokenizer.json next to its "
                "config.json and weights."
            )
    elif path.exists():
        raise ModelLoadError(f"{model!r} is a file. Give the directory that holds the model's files.")
    elif model.startswith((".", "/", "~")) or model.count("/") > 1 or not model:
        raise ModelLoadError(f"There is no directory {model!r}. Give a model's directory, or a hub id like 'org/name'.")


def read_model_json(model: str, name: str, *, revision: str | None = None) -> dict[str, Any]:
    """The object in a model's file `name`; empty where the model has no such file.

    Raises ModelLoadError where the file is no JSON object.
    """
    path = _find(model, name, revision)
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} of model {model!r} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} of model {model!r} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _find(model: str, name: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        path = Path(model, name)
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except EntryNotFoundError:  # the repository has none, or there is no network and the cache has none
        return None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{name} of model {model!r} cannot be fetched: {error}") from error


def token_ids_in(files: Iterable[Mapping[str, Any]], key: str) -> list[int]:
    """The ids under `key` (an int or a list of ints) of the first file that sets it."""
    for content in files:
        value = content.get(key)
        ids = value if isinstance(value, list) else [value]
        if value is not None:
            return [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
    return []


def generation_defaults_in(generation_config: Mapping[str, Any]) -> dict[str, float | int]:
    """The sampling parameters that a `generation_config.json` sets to a number."""
    return {
        name: value
        for name in GENERATION_DEFAULTS
        if isinstance(value := generation_config.get(name), int | float) and not isinstance(value, bool)
    }
