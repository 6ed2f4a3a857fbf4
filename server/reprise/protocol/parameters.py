"""What chat and text completions have in common: how to sample, when to stop, how to answer."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from reprise.protocol.fields import (
    MAX_INT32,
    CountOrZero,
    Flag,
    Integral,
    JsonObject,
    LogitBias,
    Metadata,
    Name,
    Penalty,
    PositiveShare,
    Seed,
    Share,
    StopStrings,
    TokenId,
    Words,
)

MAX_CHOICES = 128
MAX_RETAIN_SECONDS = 86400
"""Whatever the server's setting allows."""
MAX_MEMBERS = 128
"""Members of an object with known ones only, above any request's; beyond it not all unknown ones are told."""
_MAX_TOLD = 6


class Request(BaseModel):
    """A JSON object with known members only. Every scalar may be null, which means its default."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _stop_early(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_MEMBERS:
            unknown = (name for name in value if name not in cls.model_fields)
            told = [InitErrorDetails(type="extra_forbidden", loc=(n,), input=None) for n in islice(unknown, _MAX_TOLD)]
            raise ValidationError.from_exception_data(cls.__name__, told)
        return value


class StreamOptions(Request):
    include_usage: Flag | None = None
    include_obfuscation: Flag | None = None
    """Padding against traffic analysis, which is not done here."""


class GenerationParameters(Request):
    """The fields of both completions endpoints; those after the second comment are extensions of OpenAI's
    API.
    """

    NO_EFFECT: ClassVar[dict[str, tuple[object, ...]]] = {
        "metadata": ({},),
        "prompt_cache_key": (),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "user": (),
    }
    """Fields that are accepted and change nothing, each with the values that ask for nothing either."""

    model: Annotated[str, Field(strict=True, min_length=1, max_length=512)] | None = None
    """A served name; null is the first one."""
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES), Integral] | None = None
    seed: Seed | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    stop: StopStrings | None = None
    max_tokens: CountOrZero | None = None
    max_completion_tokens: CountOrZero | None = None
    # Without effect here, and reported as such.
    metadata: Metadata | None = None
    prompt_cache_key: Name | None = None
    safety_identifier: Name | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    store: Flag | None = None
    user: Name | None = None
    # Extensions.
    max_new_tokens: CountOrZero | None = None
    """Another name of `max_tokens`."""
    min_tokens: CountOrZero | None = None
    do_sample: Flag | None = None
    """False is temperature 0; true asks for a temperature above 0.

    A `temperature` that says otherwise is refused.
    """
    top_k: Annotated[int, Field(strict=True, ge=-1, le=MAX_INT32), Integral] | None = None
    """0 and -1 are off."""
    min_p: Share | None = None
    typical_p: PositiveShare | None = None
    repetition_penalty: Annotated[float, Field(strict=True, ge=0.01, le=100, allow_inf_nan=False)] | None = None
    bad_words: Words | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128, fail_fast=True)] | None = None
    include_stop_str_in_output: Flag | None = None
    ignore_eos: Flag | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=2**18, fail_fast=True)] | None = None
    use_cache: Flag | None = None
    add_special_tokens: Flag | None = None
    skip_special_tokens: Flag | None = None
    return_token_ids: Flag | None = None
    """Give each choice's generated ids as `token_ids`."""
    retain_seconds: Annotated[float, Field(strict=True, ge=0, le=MAX_RETAIN_SECONDS, allow_inf_nan=False)] | None = None
    """How long the generation goes on, or is kept, after its connection is lost; the server has a maximum.

    Null and 0 cancel it at once. A stream can be resumed either way, this only saves computing it again. Without
    `stream` and without an `Idempotency-Key` nobody can read it again: then it is without effect, and reported as such.
    """


class ChatTemplateParameters(Request):
    """How messages become a prompt."""

    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    """Go on with the text of the last message instead of beginning a new one."""
    chat_template_kwargs: JsonObject | None = None
