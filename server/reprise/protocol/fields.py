"""The bounded types that request models are made of.

JSON's types are kept apart: "1" and true are no numbers, 1 is no boolean. A whole number may be spelt 16.0,
as JSON Schema has it. NaN and infinities are no numbers. Every string, list, object and number has a maximum.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

MAX_TEXT = 16 * 1024**2
"""Characters of a text; the limit on the body's bytes (a setting) is usually the smaller one."""
MAX_INT32 = 2**31 - 1
_EXACT_FLOAT = 2**53


def _integral(value: object) -> object:
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT_FLOAT:
        return int(value)
    return value


def _as_list(value: object) -> object:
    if isinstance(value, str | list):
        return [value] if isinstance(value, str) else value
    raise wrong_type("a string or an array of strings")


def wrong_type(expected: str) -> PydanticCustomError:
    """The error for a value of no type that a field of several types takes."""
    return PydanticCustomError("wrong_type", "expected {expected}", {"expected": expected})


def _few(limit: int) -> BeforeValidator:
    """Refuse an object of more members before any of them is looked at."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > limit:
            context = {"field_type": "Dictionary", "max_length": limit, "actual_length": len(value)}
            raise PydanticKnownError("too_long", context)
        return value

    return BeforeValidator(check)


Integral = BeforeValidator(_integral)

Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, max_length=MAX_TEXT)]
Name = Annotated[str, Field(strict=True, max_length=512)]
Word = Annotated[str, Field(strict=True, max_length=64)]
TokenId = Annotated[int, Field(strict=True, ge=0, le=MAX_INT32)]
_token_id = TypeAdapter(TokenId)
_PIECE = 4096


def _check_token_ids(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    """As pydantic would, but piece by piece: other threads get their turns, and the first error is the only one."""
    if not isinstance(value, list) or len(value) > MAX_TEXT:
        return validate(value)
    for start in range(0, len(value), _PIECE):
        piece = value[start : start + _PIECE]
        if set(map(type, piece)) == {int} and min(piece) >= 0 and max(piece) <= MAX_INT32:
            continue
        for index, item in enumerate(piece, start):
            try:
                _token_id.validate_python(item)
            except ValidationError as error:
                problem = error.errors(include_url=False)[0]
                located = InitErrorDetails(type=problem["type"], loc=(index,), input=item, ctx=problem.get("ctx", {}))
                raise ValidationError.from_exception_data("token ids", [located]) from None
    return value


TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TEXT), WrapValidator(_check_token_ids)]
"""Any number of ids; the context of the model bounds them."""
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_INT32), Integral]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=MAX_INT32), Integral]
Seed = Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1), Integral]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
PositiveShare = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(strict=True, ge=-2, le=2, allow_inf_nan=False)]
_Line = Annotated[str, Field(strict=True, min_length=1, max_length=1024)]
_StopList = Annotated[list[_Line], Field(max_length=16)]
_WordList = Annotated[list[_Line], Field(max_length=128)]
StopStrings = Annotated[_StopList, BeforeValidator(_as_list, json_schema_input_type=_Line | _StopList)]
"""Up to 16 strings; a lone one is a list of one."""
Words = Annotated[_WordList, BeforeValidator(_as_list, json_schema_input_type=_Line | _WordList)]
"""Up to 128 strings; a lone one is a list of one."""
LogitBias = Annotated[
    dict[
        Annotated[str, Field(strict=True, pattern=r"^[0-9]{1,10}$", max_length=10)],
        Annotated[float, Field(strict=True, ge=-100, le=100, allow_inf_nan=False)],
    ],
    Field(max_length=1024),
    _few(1024),
]
Metadata = Annotated[
    dict[Annotated[str, Field(strict=True, max_length=64)], Annotated[str, Field(strict=True, max_length=512)]],
    Field(max_length=16),
    _few(16),
]

_MAX_JSON_DEPTH = 16
_MAX_JSON_NODES = 4096
_MAX_JSON_MEMBERS = 64


def _bounded(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse what is deeper or larger than any honest use."""
    nodes = 0
    level: list[Any] = [value]
    for _ in range(_MAX_JSON_DEPTH):
        below: list[Any] = []
        for node in level:
            below.extend(node.values() if isinstance(node, dict) else node)
        nodes += len(below)
        if nodes > _MAX_JSON_NODES or not all(math.isfinite(node) for node in below if isinstance(node, float)):
            break
        level = [node for node in below if isinstance(node, dict | list)]
        if not level:
            return value
    raise PydanticCustomError(
        "object_too_large",
        "must have at most {nodes} values in at most {depth} levels, and only finite numbers",
        {"nodes": _MAX_JSON_NODES, "depth": _MAX_JSON_DEPTH},
    )


JsonObject = Annotated[
    dict[str, Any],
    Field(max_length=_MAX_JSON_MEMBERS),
    _few(_MAX_JSON_MEMBERS),
    AfterValidator(_bounded),
    WithJsonSchema({"type": "object", "maxProperties": _MAX_JSON_MEMBERS}),
]
"""Plain JSON with a bound on members, values and depth."""


def neutral_only(*neutral: object, empty: bool = True) -> BeforeValidator:
    """Accept null, these values, and with `empty` the empty list or object, all meaning null; refuse the rest."""

    def check(value: object) -> None:
        # `1 == True` in Python: compare the types as well.
        if value is None or (empty and value in ([], {})):
            return
        if any(type(value) is type(item) and value == item for item in neutral):
            return
        raise PydanticCustomError("unsupported_parameter", "is not supported by this server")

    return BeforeValidator(check)


Unsupported = Annotated[None, neutral_only()]
