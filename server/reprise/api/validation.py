"""JSON bytes to a request model, with errors that name the field in the client's spelling.

Values of strings are never repeated in an error: they may be a prompt or a secret. Of duplicate members of an
object the last one counts, as in most parsers.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from reprise.api.json_bounds import check_structure
from reprise.errors import InvalidRequestError

RequestModel = TypeVar("RequestModel", bound=BaseModel)

_MAX_SHOWN_NAME = 64
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "list_type": "an array",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "none_required": "null",
    "string_type": "a string",
}
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def parse(model: type[RequestModel], body: bytes) -> RequestModel:
    """The request that a body is. Raises InvalidRequestError."""
    check_structure(body)
    try:
        # NaN and infinities are no JSON, but a refusal by the field's own rule names the field.
        value = from_json(body, allow_inf_nan=True)
    except ValueError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"The body must be a JSON object, not {_kind(value)}.", code="invalid_type")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise _refusal(model, details, value) from None


def _refusal(model: type[BaseModel], details: Sequence[ErrorDetails], body: dict[str, Any]) -> InvalidRequestError:
    """One error that tells the first problem in full and the others by name."""
    # A part that is no text, or an unsupported field, explains the unknown members beside it.
    ordered = sorted(details, key=lambda problem: problem["type"] in ("extra_forbidden", "missing"))
    path = _path(ordered[0], body)
    message, code = _explain(model, ordered[0], path)
    others = dict.fromkeys(_spell(_path(problem, body)) for problem in ordered[1:])
    others.pop(_spell(path), None)
    if others:
        names = [*others][:5]
        message += f" Wrong as well: {', '.join(names)}{', …' if len(others) > len(names) else ''}."
    return InvalidRequestError(message, param=_spell(path) or None, code=code)


def _path(problem: ErrorDetails, body: object) -> list[str | int]:
    """Where in the body the problem is: pydantic's location without the names of union members."""
    path: list[str | int] = []
    value = body
    location = problem["loc"]
    for position, step in enumerate(location):
        last = position == len(location) - 1
        if isinstance(value, dict):
            is_role = isinstance(step, str) and value.get("role", value.get("type")) == step and not last
            if step in value and not is_role:
                value = value[step]
            elif not last or problem["type"] != "missing":
                continue
            path.append(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
            path.append(step)
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append(problem["ctx"]["discriminator"].strip("'"))
    return path


def _spell(path: Sequence[str | int]) -> str:
    """`messages[0].content`, as OpenAI spells it."""
    spelt = ""
    for step in path:
        if isinstance(step, int):
            spelt += f"[{step}]"
        else:
            shown = step if len(step) <= _MAX_SHOWN_NAME else step[:_MAX_SHOWN_NAME] + "…"
            spelt += f".{shown}" if spelt else shown
    return spelt


def _explain(model: type[BaseModel], problem: ErrorDetails, path: list[str | int]) -> tuple[str, str]:
    """The message and code of a problem."""
    name, kind, context = _spell(path), problem["type"], problem.get("ctx", {})
    match kind:
        case "missing":
            return f"Missing required parameter: '{name}'.", "missing_required_parameter"
        case "union_tag_not_found":
            return f"Missing required parameter: '{name}'.", "missing_required_parameter"
        case "extra_forbidden":
            return f"Unknown parameter: '{name}'.{_suggestion(model, path)}", "unknown_parameter"
        case "union_tag_invalid":
            return f"Invalid '{name}': must be one of {context['expected_tags']}.", "invalid_value"
        case "unsupported_parameter":
            return f"'{name}' {problem['msg']}.", kind
        case "unsupported_content":
            return f"'{name}': {problem['msg']}.", kind
        case "wrong_type":
            given = _kind(problem["input"])
            return f"Invalid type for '{name}': expected {context['expected']}, got {given}.", "invalid_type"
        case "literal_error":
            return f"Invalid '{name}': must be {context['expected']}.", "invalid_value"
        case "finite_number":
            return f"Invalid '{name}': must be a finite number.", "invalid_value"
        case "string_pattern_mismatch":
            return f"Invalid '{name}': a member's name must be a token id in digits.", "invalid_value"
        case "string_too_short" | "too_short":
            least = _counted(context["min_length"], "character" if kind == "string_too_short" else "item")
            return f"Invalid '{name}': must have at least {least}.", "invalid_value"
        case "string_too_long" | "too_long":
            most = _counted(context["max_length"], "character" if kind == "string_too_long" else "item")
            return f"Invalid '{name}': must have at most {most}.", "invalid_value"
    if kind in _LIMITS:
        words, key = _LIMITS[kind]
        return f"Invalid '{name}': {problem['input']} must be {words} {context[key]}.", "invalid_value"
    if kind in _EXPECTED:
        expected, given = _EXPECTED[kind], _kind(problem["input"])
        return f"Invalid type for '{name}': expected {expected}, got {given}.", "invalid_type"
    return f"Invalid '{name}': {problem['msg']}.", "invalid_value"


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


def _kind(value: object) -> str:
    """What a value is, in JSON's words; numbers and constants as they are."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float():
            return _NOT_FINITE.get(str(value), f"{value:.17g}")
        case int():
            return f"{value}"[:32]
        case str():
            return "a string"
        case list():
            return "an array"
    return "an object"


def _suggestion(model: type[BaseModel], path: Sequence[str | int]) -> str:
    known = tuple(model.model_fields) if len(path) == 1 else _nested_names(model)
    nearest = difflib.get_close_matches(str(path[-1])[:_MAX_SHOWN_NAME], known, n=1)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""


@cache
def _nested_names(model: type[BaseModel]) -> tuple[str, ...]:
    """Names of the members of all objects within a body. A schema takes as long as hundreds of requests."""
    definitions = model.model_json_schema().get("$defs", {}).values()
    return tuple(dict.fromkeys(name for definition in definitions for name in definition.get("properties", {})))
