"""The settings: one flat tree, from which flags, variables, YAML keys and their documentation follow."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from reprise.ipc.messages import EngineConfig

BUNDLED_MODEL = "pocket"

_SIZE_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("IB", 1024), ("B", 1000))
}


def parse_size(value: object) -> object:
    """Bytes of a size such as "2GiB" or "500MB"; what is no string is left for pydantic to judge."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", value.strip())
    if match is None or match[2].upper() not in _SIZE_UNITS:
        raise PydanticCustomError("size", "not a size")
    return int(float(match[1]) * _SIZE_UNITS[match[2].upper()])


class Kind(NamedTuple):
    """How a setting's value is spelt: its placeholder in the help, and what an error says is right."""

    metavar: str
    expected: str


Port = Annotated[int, Field(ge=1, le=65535), Kind("PORT", "a whole number from 1 to 65535")]
Count = Annotated[int, Field(ge=1), Kind("N", "a whole number of at least 1")]
OptionalCount = Annotated[int | None, Field(ge=1), Kind("N", "a whole number of at least 1")]
CountOrZero = Annotated[int, Field(ge=0), Kind("N", "a whole number of at least 0")]
Share = Annotated[float, Field(gt=0, le=1), Kind("SHARE", "a number above 0 and at most 1")]
Size = Annotated[int, BeforeValidator(parse_size), Field(ge=1), Kind("SIZE", "a size such as 512MiB or 2GiB")]
OptionalSize = Annotated[
    int | None, BeforeValidator(parse_size), Field(ge=1), Kind("SIZE", "a size such as 512MiB or 2GiB")
]
Seconds = Annotated[
    float, Field(gt=0, allow_inf_nan=False), Kind("SECONDS", "a number of seconds above 0, without a unit")
]
SecondsOrZero = Annotated[
    float, Field(ge=0, allow_inf_nan=False), Kind("SECONDS", "a number of seconds, 0 or more, without a unit")
]
OptionalSeconds = Annotated[
    float | None,
    Field(gt=0, allow_inf_nan=False),
    Kind("SECONDS", "a number of seconds above 0, without a unit"),
]
Text = Annotated[str, Field(min_length=1), Kind("TEXT", "text, in quotes where it could be read as a number")]
OptionalText = Annotated[
    str | None, Field(min_length=1), Kind("TEXT", "text, in quotes where it could be read as a number")
]
Secret = Annotated[SecretStr, Field(min_length=1)]
File = Annotated[Path | None, Kind("FILE", "the path of a file")]
Directory = Annotated[Path | None, Kind("DIRECTORY", "the path of a directory")]
Switch = Annotated[bool, Kind("", "true or false")]
OptionalSwitch = Annotated[bool | None, Kind("", "true or false")]


def _setting(default: Any, group: str, description: str) -> Any:
    """A field with its default (a callable makes one), its heading in the help, and what it does."""
    extra: JsonDict = {"group": group}
    if callable(default):
        return Field(default_factory=default, description=description, json_schema_extra=extra)
    return Field(default=default, description=description, json_schema_extra=extra)


class Settings(BaseModel):
    """Every setting of the server, validated. Sizes in bytes, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False, protected_namespaces=())

    model: Text = _setting(
        BUNDLED_MODEL,
        "Model",
        "Directory or Hugging Face id of the model; pocket is the one that comes along.",
    )
    revision: OptionalText = _setting(None, "Model", "Branch, tag or commit of a Hugging Face id.")
    served_model_name: Annotated[list[Text], Kind("NAME", "a name, or a list of names")] = _setting(
        list, "Model", "Name that requests use instead of MODEL; give it again for further names."
    )
    device: Literal["auto", "cpu", "cuda"] = _setting(
        "auto", "Model", "Where the model runs; auto is CUDA where there is a GPU."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", "Model", "Number format of weights and KV cache; auto follows the model and the device."
    )
    tier: Literal["auto", "paged", "padded"] = _setting(
        "auto", "Model", "How the model is run; auto is paged where the check at load proves it equal."
    )
    kernels: Literal["auto", "native", "torch"] = _setting(
        "auto", "Model", "What computes; auto is a decoder of our own, native on a CPU, where it equals the model."
    )
    speculate: Literal["none", "ngram", "draft"] = _setting(
        "none",
        "Model",
        "Guess tokens from what the text said before, or by a draft model; answers stay the same.",
    )
    draft_model: OptionalText = _setting(
        None, "Model", "Directory or Hugging Face id of a smaller model with the same tokens, for speculate: draft."
    )
    quantize: Literal["none", "int8", "int4"] = _setting(
        "none", "Model", "Round weights to so many bits at load; needs the native decoder."
    )
    max_model_len: OptionalCount = _setting(
        None, "Model", "Tokens of a request at most, prompt and output; at most the model's own context."
    )
    chat_template: File = _setting(None, "Model", "Jinja chat template that replaces the model's own.")
    generation_defaults: Literal["model", "openai"] = _setting(
        "model", "Model", "Whose sampling defaults hold: the model's generation_config.json, or OpenAI's."
    )
    deterministic: OptionalSwitch = _setting(
        None,
        "Model",
        "Whether answers have the same bits whatever else is computed; by default where it is cheap, on the paged"
        " tier. If asked for, a model or device that cannot is refused at start.",
    )
    load_timeout: Seconds = _setting(1800.0, "Model", "Loading that takes longer is given up.")

    max_num_seqs: Count = _setting(64, "Engine", "Sequences that run in one step at most.")
    max_num_batched_tokens: Count = _setting(
        2048, "Engine", "Tokens that one forward computes at most; longer prompts are computed in chunks."
    )
    kv_cache_memory: OptionalSize = _setting(
        None,
        "Engine",
        "Memory for the KV cache, taken before it is needed; by default chosen from the memory at hand.",
    )
    gpu_memory_utilization: Share = _setting(
        0.9, "Engine", "Share of the GPU's memory for weights, KV cache and work space together."
    )
    block_size: Count = _setting(16, "Engine", "Tokens of a KV cache block.")
    prefix_cache: Switch = _setting(
        default=True, group="Engine", description="Reuse what was computed for equal beginnings of prompts."
    )
    num_threads: OptionalCount = _setting(
        None, "Engine", "CPU threads of the engine; by default one a core that the process may use."
    )
    heartbeat_timeout: Seconds = _setting(
        10.0,
        "Engine",
        "Silence of the engine process after which it counts as hung and is replaced; while loading six times as long.",
    )
    step_timeout: Seconds = _setting(
        300.0, "Engine", "Time for one step of the engine; one that takes longer counts as hung and is replaced."
    )

    host: Text = _setting("127.0.0.1", "HTTP", "Address to listen on; 0.0.0.0 or :: for all.")
    port: Port = _setting(8000, "HTTP", "Port to listen on.")
    api_key: Annotated[list[Secret], Kind("KEY", "a key, or a list of keys")] = _setting(
        list,
        "HTTP",
        "Key that requests must carry; give it again for further keys. Arguments show in the list of"
        " processes: better use REPRISE_API_KEY or --api-key-file.",
    )
    api_key_file: File = _setting(None, "HTTP", "File of further keys, one a line.")
    cors_origins: Annotated[list[Text], Kind("ORIGIN", "an origin such as https://example.org, or a list")] = _setting(
        list, "HTTP", "Origin whose web pages may call this server; * is any. Give it again for further ones."
    )
    allowed_hosts: Annotated[list[Text], Kind("NAME", "a host name such as example.org, or a list")] = _setting(
        list,
        "HTTP",
        "Name that requests may have in their Host header besides those of loopback and HOST; * is any. Without"
        " one, any is taken where HOST is no loopback address. Give it again for further ones.",
    )
    metrics: Switch = _setting(default=True, group="HTTP", description="Offer /metrics for Prometheus.")
    public_metrics: Switch = _setting(
        default=False, group="HTTP", description="Offer /metrics without a key where there are keys."
    )

    max_waiting_seqs: CountOrZero = _setting(
        256, "Limits", "Sequences that wait for a place at most; beyond it requests get 429."
    )
    max_choices: Count = _setting(128, "Limits", "Choices (prompts times n) of one request at most.")
    max_body_size: Size = _setting(4 * 1024**2, "Limits", "Bytes of a request body at most.")
    request_timeout: OptionalSeconds = _setting(
        None, "Limits", "Time that a request may take in all, until its last byte is sent; by default no limit."
    )
    header_timeout: Seconds = _setting(10.0, "Limits", "Time for the head of a request to arrive.")
    body_timeout: Seconds = _setting(60.0, "Limits", "Time for the body of a request to arrive.")
    send_timeout: Seconds = _setting(
        60.0, "Limits", "Time in which a client must take 64 KiB of its answer, or all that waits."
    )
    idle_timeout: Seconds = _setting(75.0, "Limits", "Time that a connection may stay open between requests.")
    keep_alive_interval: SecondsOrZero = _setting(
        15.0, "Limits", "Interval at which a stream gets a comment line that keeps it alive, silent or not; 0 is never."
    )
    max_retain_seconds: SecondsOrZero = _setting(
        300.0, "Limits", "Time that a request may ask to be kept after its connection is lost, at most."
    )
    idempotency_seconds: SecondsOrZero = _setting(
        120.0,
        "Limits",
        "Time that a request with an Idempotency-Key is kept after its end, and goes on after its client left.",
    )
    max_retained_tokens: CountOrZero = _setting(
        1_000_000, "Limits", "Tokens of all requests that are kept to be read again at most, running ones included."
    )
    drain_timeout: SecondsOrZero = _setting(30.0, "Limits", "Time that running requests get to finish after SIGTERM.")

    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "Logging", "Least level to log.")
    log_format: Literal["auto", "text", "json"] = _setting(
        "auto", "Logging", "Text lines or JSON lines; auto is text on a terminal, JSON elsewhere."
    )
    bundle_dir: Directory = _setting(
        None,
        "Logging",
        "Directory to write a bundle of every response to, for `reprise replay`. It has the prompt and the answer.",
    )
    max_bundles: Count = _setting(1000, "Logging", "Bundles to keep in it; the oldest are removed.")

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise PydanticCustomError(
                "conflict",
                "{max_num_batched_tokens} is less than max_num_seqs, {max_num_seqs}: every running sequence"
                " needs one token a step, so raise this one or lower the other",
                {
                    "field": "max_num_batched_tokens",
                    "max_num_batched_tokens": self.max_num_batched_tokens,
                    "max_num_seqs": self.max_num_seqs,
                },
            )
        if self.speculate == "draft" and self.draft_model is None:
            raise PydanticCustomError(
                "conflict", "draft takes a draft model: name one with --draft-model", {"field": "speculate"}
            )
        return self

    @property
    def model_path(self) -> str:
        """The model as loaders take it: a directory or a Hugging Face id."""
        return _path_of(self.model)

    @property
    def draft_model_path(self) -> str | None:
        """As `model_path`; None where no draft model is used."""
        if self.speculate != "draft" or self.draft_model is None:
            return None
        return _path_of(self.draft_model)

    @property
    def model_names(self) -> list[str]:
        """Names that a request may use, the one that responses show first."""
        return self.served_model_name or [self.model]

    def engine_config(self) -> EngineConfig:
        values = {name: getattr(self, name) for name in EngineConfig.__struct_fields__}
        return EngineConfig(**values | {"model": self.model_path, "draft_model": self.draft_model_path})


def _path_of(model: str) -> str:
    return str(resources.files("reprise") / BUNDLED_MODEL) if model == BUNDLED_MODEL else model


def flag_name(setting: str) -> str:
    """The command line's spelling."""
    return "MODEL" if setting == "model" else "--" + setting.replace("_", "-")


def environment_name(setting: str) -> str:
    return "REPRISE_" + setting.upper()


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words of a setting that takes one of few."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def is_switch(field: FieldInfo) -> bool:
    """Whether a setting is true or false, or unset."""
    return field.annotation in (bool, bool | None)


def kind(field: FieldInfo) -> Kind:
    if words := choices(field):
        return Kind("|".join(words), "one of " + ", ".join(words))
    return next(item for item in field.metadata if isinstance(item, Kind))
