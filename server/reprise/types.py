"""The nouns that both processes share: token-level parameters, requests and deltas. No torch, no text rules."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

SEED_MIN = -(2**63)
SEED_MAX = 2**63 - 1


class FinishReason(StrEnum):
    """Why a sequence ended. The first two are OpenAI's words, the others never reach a `finish_reason` field."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token of a sequence is chosen: resolved, validated, token-level.

    Every field has its meaning in every batch: nothing here is shared between requests. Logits are changed in
    the order repetition penalty, presence and frequency penalty, logit bias, masks (allowed ids, bad words, end
    tokens before `min_tokens`), temperature, top-k, top-p, min-p, typical-p; then the draw.
    """

    seed: int
    """Signed 64 bit. With the choice index and the position it decides every draw."""
    max_tokens: int
    """At least 0 generated tokens at most; 0 only scores the prompt."""
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    """Over prompt and output, as in transformers."""
    presence_penalty: float = 0.0
    """Over the output alone, as OpenAI's."""
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[bytes, ...] = ()
    """Byte strings that the concatenated bytes of the generated tokens never contain."""
    end_token_ids: tuple[int, ...] = ()
    """The model's end-of-sequence ids; empty where `ignore_eos` was asked for."""
    stop_token_ids: tuple[int, ...] = ()
    """Further ids that end the sequence."""
    num_logprobs: int | None = None
    """None: no log-probabilities. k: the chosen token's, and the k most likely ones'. Of the model's own
    distribution, before penalties, masks and temperature."""
    num_prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    use_cache: bool = True
    """False: nothing computed for an earlier token is reused, at any step."""


class StopStrings(msgspec.Struct, frozen=True):
    """Strings that end a choice's text, and whether the one found stays in it."""

    strings: tuple[str, ...] = ()
    include_in_output: bool = False


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and what to make of it. Valid by construction: everything refusable was refused before."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    num_choices: int = 1
    stop: StopStrings = StopStrings()
    skip_special_tokens: bool = True
    """Whether special tokens contribute no text."""
    prediction_token_ids: list[int] = []
    """What the request expects its answer to be. It makes the answer quicker and no other."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """A token's log-probability with the most likely alternatives, most likely first. Natural logarithms."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class LogprobToken(msgspec.Struct, frozen=True):
    """One token as a `logprobs` field shows it: `data` are the raw bytes it spells, even part of a character."""

    token_id: int
    text: str
    data: bytes
    logprob: float


class LogprobEntry(msgspec.Struct, frozen=True):
    """A generated (or prompt) token in its place, with the alternatives asked for."""

    token: LogprobToken
    top: list[LogprobToken] = []


class ChoiceDelta(msgspec.Struct, kw_only=True):
    """What is new in one choice since the last delta. A response is the fold of its deltas, streamed or not."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    """All newly generated ids, an end token included."""
    logprobs: list[LogprobEntry] | None = None
    """For the tokens whose text is in `text`; an end token spells nothing and is left out."""
    prompt_logprobs: list[LogprobEntry | None] | None = None
    """Once, on the first delta, where asked for; the first prompt token has none."""
    finish_reason: Literal[FinishReason.STOP, FinishReason.LENGTH] | None = None
    """Set on the choice's last delta."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that matched; None for the model's own end token and for length."""
    num_cached_tokens: int = 0
    """Prompt tokens whose computation was reused; constant for a choice from its first delta on."""
