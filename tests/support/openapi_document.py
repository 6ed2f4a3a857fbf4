"""OpenAI's own OpenAPI document as a judge of responses; its path is in the environment variable OPENAI_OPENAPI."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

VARIABLE = "OPENAI_OPENAPI"


def is_available() -> bool:
    return bool(os.environ.get(VARIABLE))


def check(schema: str, value: Any) -> None:
    """Fail unless the value fits that schema of the document. Without the document nothing is checked."""
    if is_available():
        errors = [f"{error.json_path}: {error.message}" for error in validator(schema).iter_errors(value)]
        assert not errors, (schema, errors)


@functools.cache
def validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator(_components() | {"$ref": f"#/components/schemas/{schema}"})


@functools.cache
def _components() -> dict[str, Any]:
    text = Path(os.environ[VARIABLE]).read_text(encoding="utf-8")
    document = yaml.load(text, Loader=yaml.CSafeLoader)
    schemas = _with_null(document["components"]["schemas"])
    _state_what_is_left_out(schemas)
    return {"components": {"schemas": schemas}}


def _with_null(node: Any) -> Any:
    """OpenAPI 3.0's `nullable`, which the document still uses, in the words of JSON Schema."""
    if isinstance(node, list):
        return [_with_null(item) for item in node]
    if not isinstance(node, dict):
        return node
    schema = {key: _with_null(value) for key, value in node.items() if key != "discriminator"}
    if schema.get("nullable") is True:
        rest = {key: value for key, value in schema.items() if key != "nullable"}
        return {"anyOf": [rest, {"type": "null"}]}
    return schema


def _state_what_is_left_out(schemas: dict[str, Any]) -> None:
    """What OpenAI's server sends and its document does not say.

    In a chunk of a completion the finish reason is null until the end. With `echo` the first token has no
    probability: its entries are null.
    """
    choice = schemas["CreateCompletionResponse"]["properties"]["choices"]["items"]["properties"]
    chunk = copy.deepcopy(schemas["CreateCompletionResponse"])
    chunk_choice = chunk["properties"]["choices"]["items"]["properties"]
    for properties in (choice, chunk_choice):
        arrays = properties["logprobs"]["anyOf"][0]["properties"]
        for name in ("token_logprobs", "top_logprobs"):
            arrays[name]["items"] = {"anyOf": [arrays[name]["items"], {"type": "null"}]}
    chunk_choice["finish_reason"] = {"anyOf": [chunk_choice["finish_reason"], {"type": "null"}]}
    # Without the option there is no usage in a chunk, with it null until the last.
    chunk["properties"]["usage"] = {"anyOf": [chunk["properties"]["usage"], {"type": "null"}]}
    schemas["CompletionChunk"] = chunk
