"""The messages of a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from reprise.protocol.fields import Name, Text, Unsupported, wrong_type
from reprise.protocol.parameters import Request


def _text_only(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in ("text", "refusal"):
        raise PydanticCustomError(
            "unsupported_content",
            "a content part of type '{kind}' is not supported: this server takes text only",
            {"kind": kind[:64]},
        )
    return part


class TextPart(Request):
    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: Unsupported = None


class RefusalPart(Request):
    type: Literal["refusal"]
    refusal: Text


def _text_or_parts(value: Any) -> Any:
    if isinstance(value, str | list):
        return value
    raise wrong_type("a string or an array of content parts")


def _content_kind(value: Any) -> str:
    return "parts" if isinstance(value, list) else "text"


MAX_PARTS = 4096
TextParts = Annotated[
    list[Annotated[TextPart, BeforeValidator(_text_only)]], Field(max_length=MAX_PARTS, fail_fast=True)
]
AssistantPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
AssistantParts = Annotated[
    list[Annotated[AssistantPart, BeforeValidator(_text_only)]], Field(max_length=MAX_PARTS, fail_fast=True)
]
Content = Annotated[
    Annotated[Text, Tag("text")] | Annotated[TextParts, Tag("parts")],
    Discriminator(_content_kind),
    BeforeValidator(_text_or_parts),
]
AssistantContent = Annotated[
    Annotated[Text, Tag("text")] | Annotated[AssistantParts, Tag("parts")],
    Discriminator(_content_kind),
    BeforeValidator(_text_or_parts),
]


class Prediction(Request):
    """What an answer is expected to be."""

    type: Literal["content"]
    content: Content


class FunctionCall(Request):
    name: Name
    arguments: Text
    """A JSON object in a string."""


class ToolCall(Request):
    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall


class DeveloperMessage(Request):
    role: Literal["developer"]
    content: Content
    name: Name | None = None


class SystemMessage(Request):
    role: Literal["system"]
    content: Content
    name: Name | None = None


class UserMessage(Request):
    role: Literal["user"]
    content: Content
    name: Name | None = None


class AssistantMessage(Request):
    """Content may be absent where tool calls or a refusal stand for it."""

    role: Literal["assistant"]
    content: AssistantContent | None = None
    refusal: Text | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    function_call: FunctionCall | None = None
    audio: Unsupported = None
    annotations: Unsupported = None
    """Responses may carry it empty, and clients send responses back."""


class ToolMessage(Request):
    role: Literal["tool"]
    content: Content
    tool_call_id: Name
    name: Name | None = None


class FunctionMessage(Request):
    role: Literal["function"]
    content: Content | None = None
    name: Name


Message = Annotated[
    DeveloperMessage | SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage,
    Field(discriminator="role"),
]
Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
