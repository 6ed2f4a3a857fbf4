"""The bodies that the endpoints take."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from reprise.protocol.fields import (
    Count,
    Flag,
    Integral,
    JsonObject,
    Name,
    Text,
    TokenIds,
    Unsupported,
    neutral_only,
    wrong_type,
)
from reprise.protocol.messages import Messages, Prediction
from reprise.protocol.parameters import ChatTemplateParameters, GenerationParameters, Request

MAX_PROMPTS = 2048


class ChatCompletionRequest(GenerationParameters, ChatTemplateParameters):
    """`POST /v1/chat/completions`."""

    NO_EFFECT: ClassVar[dict[str, tuple[object, ...]]] = GenerationParameters.NO_EFFECT | {
        "parallel_tool_calls": (),
        "prompt_cache_options": ({},),
        "prompt_cache_retention": (),
        "reasoning_effort": ("none",),
        "verbosity": (),
    }

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    max_new_tokens: Count | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=20), Integral] | None = None
    prediction: Prediction | None = None
    """What the answer may be: where it is, it comes quicker."""
    # Without effect here, and reported as such.
    parallel_tool_calls: Flag | None = None
    prompt_cache_options: JsonObject | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    # Not supported: refused unless they ask for nothing.
    audio: Unsupported = None
    function_call: Annotated[None, neutral_only("none", "auto")] = None
    functions: Unsupported = None
    modalities: Annotated[None, neutral_only(["text"])] = None
    moderation: Unsupported = None
    response_format: Annotated[None, neutral_only({"type": "text"})] = None
    tool_choice: Annotated[None, neutral_only("none", "auto")] = None
    tools: Unsupported = None
    web_search_options: Annotated[None, neutral_only(empty=False)] = None  # an empty one asks for a search


def _prompt_kind(value: Any) -> str:
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else None
    if isinstance(first, list):
        return "token_id_lists"
    return "token_ids" if isinstance(first, int | float) else "texts"


def _prompt_type(value: Any) -> Any:
    if isinstance(value, str | list):
        return value
    raise wrong_type("a string, an array of strings, an array of token ids or an array of such arrays")


Prompt = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
    | Annotated[TokenIds, Tag("token_ids")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), Tag("token_id_lists")],
    Discriminator(_prompt_kind),
    BeforeValidator(_prompt_type),
]
"""A text, texts, token ids or lists of token ids."""


class CompletionRequest(GenerationParameters):
    """`POST /v1/completions`."""

    prompt: Prompt | None = None
    """Null and "" generate from the model's start token alone."""
    echo: Flag | None = None
    logprobs: Annotated[int, Field(strict=True, ge=0, le=20), Integral] | None = None
    best_of: Annotated[int, Field(strict=True, ge=0, le=20), Integral] | None = None
    """Supported where it says nothing: 1 or equal to `n`."""
    suffix: Annotated[None, neutral_only("")] = None


class TokenizeRequest(ChatTemplateParameters):
    """`POST /tokenize`: a prompt or the messages of a chat."""

    model: Annotated[str, Field(strict=True, min_length=1, max_length=512)] | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: Flag | None = None
    """Default true for a prompt and false for messages, whose template writes them."""
    return_token_strs: Flag | None = None


class DetokenizeRequest(Request):
    """`POST /detokenize`."""

    model: Annotated[str, Field(strict=True, min_length=1, max_length=512)] | None = None
    tokens: TokenIds
    skip_special_tokens: Flag | None = None
    """Default false: what the ids spell."""


class ReplayRequest(Request):
    """`POST /v1/replay`: the id of a response that the server has a bundle of, or a bundle itself."""

    id: Name | None = None
    bundle: Annotated[dict[str, Any], Field(strict=True)] | None = None
    """As the server wrote it."""
