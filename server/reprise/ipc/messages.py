"""The messages between the API process and the engine process, grouped by receiver.

Token ids in, token ids out: no text but an error's message, no tensor. A `sequence_id` is chosen by the API
process, names one choice of one request in one life of the engine, and is never used twice in the life of an API
process: so nothing that a dead engine said can be taken for what its successor says.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from reprise.types import FinishReason, SamplingParams, TokenLogprobs

Tier = Literal["paged", "padded"]

IDLE_SECONDS = 1.0
"""How often an engine that has nothing to do says so."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine needs to know of the settings. Sizes in tokens unless they say bytes."""

    model: str
    revision: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tier: Literal["auto", "paged", "padded"] = "auto"
    kernels: Literal["auto", "native", "torch"] = "auto"
    """Of the paged tier on a CPU."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """What the native decoder rounds weights to."""
    max_model_len: int | None = None
    max_num_seqs: int = 64
    """Sequences that run in one step at most."""
    max_num_batched_tokens: int = 2048
    """Tokens that one forward computes at most."""
    block_size: int = 16
    kv_cache_memory: int | None = None
    """Bytes of the KV pool; None chooses from the memory at hand."""
    gpu_memory_utilization: float = 0.9
    prefix_cache: bool = True
    speculate: Literal["none", "ngram", "draft"] = "none"
    """Where guesses of what comes next are from, beside the prediction of a request."""
    draft_model: str | None = None
    """Directory or hub id of the model that guesses."""
    num_threads: int | None = None
    deterministic: bool | None = None
    """Whether bits may not depend on company; None: where it is cheap, that is on the paged tier."""


# ---- to the engine -------------------------------------------------------------------------------------------


class Start(msgspec.Struct, frozen=True, tag="start"):
    """First message: load this. `token_bytes[i]` is what token i spells; None where the tokenizer cannot tell.

    `reserve_kv_cache`: take the memory of the KV pool while there is nothing else to do.
    """

    config: EngineConfig
    token_bytes: list[bytes] | None
    reserve_kv_cache: bool = False


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Generate for one choice. `output_token_ids` were generated and delivered before: go on after them."""

    sequence_id: int
    choice_index: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    output_token_ids: list[int] = []
    prediction_token_ids: list[int] = []
    """What the output may be, for guesses that change nothing."""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget these sequences. Unknown or finished ids are no error: the messages may have crossed."""

    sequence_ids: list[int]


ToEngine = Start | Add | Abort


# ---- to the API process --------------------------------------------------------------------------------------


class LoadProgress(msgspec.Struct, frozen=True, tag="load_progress"):
    """Where loading stands: a stage in a few words and the share done, 0 to 1."""

    stage: str
    fraction: float


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """The model cannot be served; the process exits after this message."""

    message: str


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The model is loaded and what was found about it."""

    tier: Tier
    tier_reason: str
    """Why this tier: what the equivalence gate found."""
    kernels: str = "torch"
    """What computes: torch, or the native decoder with its instruction set."""
    device: str
    device_name: str
    dtype: str
    architecture: str
    num_parameters: int
    vocab_size: int
    """Rows of the output matrix: the ids that can be sampled, padding rows included."""
    max_model_len: int
    num_kv_tokens: int
    """Tokens that the KV pool holds in all."""
    kv_cache_memory: int
    """Bytes of the pool and of a draft model's: what the next life is given, so that what ran in this one fits."""
    max_sequence_tokens: int
    """Tokens that one sequence can have, prompt and output: the smaller of context and pool."""
    max_num_seqs: int
    weights_fingerprint: str
    model_config_fingerprint: str = ""
    """Of the model's own configuration: what weights mean may differ where no logit of a start-up check does."""
    load_seconds: float
    deterministic: bool = False
    """Whether the start-up check found that bits do not depend on company, and the setting asks for it or allows it."""
    deterministic_reason: str = ""
    """One phrase: why, or why not."""
    numerics_fingerprint: str = ""
    """A digest of the logits' bits that the check computed: other kernels, threads or CPUs may give another one."""


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """The process is alive, whatever its main loop does. Sent every second, while loading as well."""


class SequenceOutput(msgspec.Struct, frozen=True, kw_only=True, tag="sequence_output", omit_defaults=True):
    """What one step gave for one sequence. `finish_reason` marks the one terminal message of the sequence."""

    sequence_id: int
    position: int
    """Index of `token_ids[0]` among the generated tokens."""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The member of `stop_token_ids` that ended it; None for the model's own end token."""
    error_code: str | None = None
    error_message: str | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and counters of the engine's life, for metrics and readiness."""

    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_kv_tokens_used: int = 0
    num_kv_tokens_cached: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_memory_shortages: int = 0
    """Forwards that ran out of memory and were repeated in smaller parts."""
    num_draft_tokens: int = 0
    """Guesses of what comes next that were computed, and of them those that were right."""
    num_kept_draft_tokens: int = 0
    step_seconds: float = 0.0
    """Sum over all steps."""


class StepOutput(msgspec.Struct, frozen=True, tag="step_output"):
    """Everything one step produced. Sent with no outputs when the engine falls idle, and every second that it is."""

    outputs: list[SequenceOutput]
    stats: EngineStats


FromEngine = LoadProgress | LoadFailed | Ready | StepOutput | Heartbeat
