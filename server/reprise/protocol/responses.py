"""The bodies that the endpoints answer. A member that is UNSET is left out; None is written as null."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from reprise.types import FinishReason

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's value for it."""

Finished = Literal[FinishReason.STOP, FinishReason.LENGTH]


def finite(logprob: float) -> float:
    """A log-probability as JSON can say it."""
    return max(LEAST_LOGPROB, logprob)


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0
    audio_tokens: int = 0


class CompletionTokensDetails(Struct, frozen=True):
    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()


class RepriseExtension(Struct, frozen=True):
    """What this server says beyond OpenAI's API: the seed that was used, and fields that changed nothing.

    deterministic: whether the same request with this seed has this answer in every circumstance, for as long as the
    system fingerprint is the same.
    """

    seed: int
    ignored_parameters: list[str]
    deterministic: bool


class TokenLogprob(Struct, frozen=True):
    """A likely token at a position."""

    token: str
    logprob: float
    bytes: list[int]


class PositionLogprobs(Struct, frozen=True):
    """`bytes` of all positions joined are the text.

    Where a stop string cuts a token in two, that last position is the whole token, more than the text has of it;
    tokens behind the cut are left out.
    """

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Struct):
    content: list[PositionLogprobs]
    refusal: None = None


class ChatDelta(Struct, frozen=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


ServiceTier = Literal["default"] | UnsetType
"""There is one tier, which is said where a request asks for any."""


class ChatChunkChoice(Struct, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finished | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    service_tier: ServiceTier = UNSET
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    reprise: RepriseExtension | UnsetType = UNSET


class ChatMessage(Struct):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    refusal: None = None


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finished | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    service_tier: ServiceTier = UNSET
    choices: list[ChatChoice]
    usage: Usage
    reprise: RepriseExtension


class LegacyLogprobs(Struct):
    """Parallel arrays, one entry a token; `text_offset` counts characters of the choice's text.

    A token that is part of a character is spelt `bytes:` and hexadecimal escapes. A stop string's cut is as in
    `PositionLogprobs`.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct):
    """A whole choice, or what is new of one in a chunk."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None = None
    finish_reason: Finished | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class Completion(Struct, frozen=True, kw_only=True):
    """A whole response, or a chunk of one: OpenAI gives both the same shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    reprise: RepriseExtension | UnsetType = UNSET


class Model(Struct, frozen=True, kw_only=True):
    """A served name. What follows `owned_by` is null until the model is loaded."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "reprise"
    root: str
    max_model_len: int | None = None
    tier: str | None = None
    tier_reason: str | None = None
    kernels: str | None = None
    architecture: str | None = None
    num_parameters: int | None = None
    dtype: str | None = None
    device: str | None = None
    deterministic: bool | None = None
    """Whether bits are promised, as in each response, and why or why not."""
    deterministic_reason: str | None = None
    system_fingerprint: str | None = None
    """As in each response: equal where servers answer alike, so that a stream may go on at either."""


class ModelList(Struct, frozen=True):
    data: list[Model]
    object: Literal["list"] = "list"


class Tokenization(Struct, frozen=True):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Detokenization(Struct, frozen=True):
    prompt: str


class Error(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Struct, frozen=True):
    error: Error


class Readiness(Struct, frozen=True):
    """`status` is a word; `load_*` tell how far loading is while it lasts."""

    status: str
    reason: str
    load_stage: str | UnsetType = UNSET
    load_fraction: float | UnsetType = UNSET
