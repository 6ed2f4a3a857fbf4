"""The official client's own types as a judge of JSON: no coercion, and no field that they do not declare."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel

EXTENSIONS = {
    "reprise",
    "stop_reason",
    "token_ids",
    # of a model
    "root",
    "max_model_len",
    "tier",
    "tier_reason",
    "kernels",
    "architecture",
    "num_parameters",
    "dtype",
    "device",
    "deterministic",
    "deterministic_reason",
    "system_fingerprint",
}
"""Fields that this server adds on purpose."""

Type = TypeVar("Type", bound=BaseModel)


def validate(model: type[Type], value: Any) -> Type:
    """The value as that type. Fails on a wrong type, a missing field, and one that nobody knows."""
    parsed = model.model_validate(value, strict=True)
    unknown = sorted(set(undeclared(parsed, model.__name__)))
    assert not unknown, unknown
    return parsed


def undeclared(value: Any, path: str) -> Iterator[str]:
    """Where fields are that no type declares; what is inside an extension is not looked at."""
    if isinstance(value, list):
        for item in value:
            yield from undeclared(item, f"{path}[]")
    elif isinstance(value, BaseModel):
        yield from (f"{path}.{name}" for name in set(value.model_extra or {}) - EXTENSIONS)
        for name, field in type(value).model_fields.items():
            if name not in value.model_fields_set:
                assert not field.is_required(), f"{path}.{name} is missing"
            child = getattr(value, name)
            assert child is not None or _may_be_null(field.annotation), f"{path}.{name} is null"
            yield from undeclared(child, f"{path}.{name}")


def _may_be_null(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return type(None) in typing.get_args(annotation)
    return annotation in (None, type(None), Any)
