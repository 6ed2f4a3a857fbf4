"""The bundle: one response as a JSON file, with all that is needed to compute it again and what came out.

It holds the prompt and the answer, and no key. Log-probabilities are natural ones, as doubles written so that reading
them gives the same bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from reprise.errors import BundleError, GenerationError, UnavailableError
from reprise.ipc.messages import EngineConfig
from reprise.replay.facts import ServedModel, ServedText, Software
from reprise.types import ChoiceDelta, FinishReason, GenerationRequest, LogprobEntry, SamplingParams, StopStrings

FORMAT = 2
"""Raised when a bundle of the former format could not be read any more."""
MAX_BUNDLE_BYTES = 64 * 1024**2
_CIRCUMSTANCES = frozenset({"cancelled", "capacity", "incomplete", "request_timeout"})
"""Codes of errors that come from what is around a request."""

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Logprob = float | Literal["-inf"]
"""JSON has no infinity."""
Outcome = Literal["complete", "aborted", "failed"]


class Logprobs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """In columns, an entry a token. Tokens without text at the end of a choice have none."""

    chosen: list[Logprob | None]
    """None: the first token of a prompt has no log-probability."""
    top_token_ids: list[list[TokenId]]
    """The most likely alternatives, most likely first."""
    top_logprobs: list[list[Logprob]]

    def __post_init__(self) -> None:
        columns = (self.chosen, self.top_token_ids, self.top_logprobs)
        if len({len(column) for column in columns}) > 1:
            raise ValueError("'chosen', 'top_token_ids' and 'top_logprobs' must be of one length")
        if any(len(ids) != len(values) for ids, values in zip(self.top_token_ids, self.top_logprobs, strict=True)):
            raise ValueError("each list of 'top_logprobs' must be as long as that of 'top_token_ids'")

    def __len__(self) -> int:
        return len(self.chosen)

    def extend(self, entries: Iterable[LogprobEntry | None]) -> None:
        for entry in entries:
            self.chosen.append(None if entry is None else spelt(entry.token.logprob))
            self.top_token_ids.append([] if entry is None else [token.token_id for token in entry.top])
            self.top_logprobs.append([] if entry is None else [spelt(token.logprob) for token in entry.top])


class Choice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What came out of one choice, as far as it came. Without a finish reason it was still going on."""

    token_ids: list[TokenId]
    text: str
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None


class Generation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One prompt: what the engine was asked, and its choices."""

    request: GenerationRequest
    choices: list[Choice]

    def __post_init__(self) -> None:
        if len(self.choices) != self.request.num_choices:
            raise ValueError(f"there are {len(self.choices)} choices, and 'num_choices' is {self.request.num_choices}")


class Failure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The error that a response ended with."""

    code: str
    message: str


class Bundle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One response. A choice's number in it is `number of its generation * num_choices + number in there`."""

    format: int = FORMAT
    id: Annotated[str, msgspec.Meta(max_length=128, pattern=r"\A[A-Za-z0-9_-]+\Z")]
    endpoint: str
    created: int
    """Seconds since 1970."""
    outcome: Outcome
    """Aborted: cut off by circumstances, as when the client left. Failed: by an error that is the request's own."""
    error: Failure | None = None
    """What the client was told."""
    system_fingerprint: Annotated[str, msgspec.Meta(max_length=128)]
    software: Software
    settings: EngineConfig
    """As the server was started, but device, dtype, tier and kernels as they were chosen, and the model as named."""
    model: ServedModel
    text: ServedText
    parameters: dict[str, Any]
    """The request's own fields, for the reader; nothing is computed from them."""
    generations: Annotated[list[Generation], msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        if len({generation.request.num_choices for generation in self.generations}) > 1:
            raise ValueError("all of 'generations' must have the same 'num_choices'")

    @property
    def num_choices(self) -> int:
        """Of each prompt."""
        return self.generations[0].request.num_choices

    @property
    def choices(self) -> list[Choice]:
        """Of all prompts, in the response's order."""
        return [choice for generation in self.generations for choice in generation.choices]


class Recording:
    """Takes down what comes out of a request's generations, delta by delta."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        """requests: of one response, all with the same number of choices."""
        self.generations = [
            Generation(
                request=request,
                choices=[Choice(token_ids=[], text="", finish_reason=None) for _ in range(request.num_choices)],
            )
            for request in requests
        ]
        self.choices = [choice for generation in self.generations for choice in generation.choices]
        self._texts: list[list[str]] = [[] for _ in self.choices]

    def add(self, delta: ChoiceDelta) -> None:
        """delta: its index is that of the choice in the response."""
        choice = self.choices[delta.index]
        choice.token_ids.extend(delta.token_ids)
        if delta.text:
            self._texts[delta.index].append(delta.text)
        if delta.logprobs is not None:
            choice.logprobs = choice.logprobs or _no_logprobs()
            choice.logprobs.extend(delta.logprobs)
        if delta.prompt_logprobs is not None:
            choice.prompt_logprobs = _no_logprobs()
            choice.prompt_logprobs.extend(delta.prompt_logprobs)
        if delta.finish_reason is not None:
            choice.finish_reason = "stop" if delta.finish_reason is FinishReason.STOP else "length"
            choice.stop_reason = delta.stop_reason

    def finish(self) -> list[Generation]:
        """All of it, once nothing more comes."""
        for choice, texts in zip(self.choices, self._texts, strict=True):
            choice.text = "".join(texts)
        return self.generations


def outcome_of(error: Exception | None) -> tuple[Outcome, Failure | None]:
    """What a response's error, or its absence, makes of it."""
    match error:
        case None:
            return "complete", None
        case GenerationError():
            outcome: Outcome = "aborted" if is_circumstance(error) else "failed"
            return outcome, Failure(code=error.code, message=str(error))
        case UnavailableError():
            return "aborted", Failure(code="service_unavailable", message=str(error))
    return "aborted", None


def is_circumstance(error: GenerationError) -> bool:
    """Whether the same request need not meet the error again."""
    return error.code in _CIRCUMSTANCES


def spelt(logprob: float) -> Logprob:
    return "-inf" if logprob == -math.inf else logprob


def encode(bundle: Bundle) -> bytes:
    return msgspec.json.encode(bundle) + b"\n"


def decode(data: bytes, *, source: str) -> Bundle:
    """The bundle that a JSON text is. source: what an error calls it. Raises BundleError."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{source} is not valid JSON: {error}") from None
    return convert(value, source=source)


def convert(value: object, *, source: str) -> Bundle:
    """The bundle that a decoded JSON value is. Raises BundleError that names the field."""
    if not isinstance(value, dict) or type(value.get("format")) is not int:
        raise BundleError(f"{source} is not a bundle: it must be a JSON object whose 'format' is {FORMAT}")
    if value["format"] != FORMAT:
        raise BundleError(f"{source} has format {value['format']}, and this version reads format {FORMAT}")
    try:
        bundle = msgspec.convert(value, Bundle, str_keys=True)
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        raise BundleError(f"{source} is not a bundle of format {FORMAT}: {error}") from None
    _check_known(value, source)
    return bundle


def _check_known(value: dict[str, Any], source: str) -> None:
    """Refuse unknown members of the structs that processes of one version exchange, where they are let pass."""
    parts: list[tuple[dict[str, Any], type[msgspec.Struct], str]] = [(value["settings"], EngineConfig, "settings")]
    for number, generation in enumerate(value["generations"]):
        where, request = f"generations[{number}].request", generation["request"]
        parts.append((request, GenerationRequest, where))
        parts.append((request["sampling"], SamplingParams, f"{where}.sampling"))
        parts.append((request.get("stop", {}), StopStrings, f"{where}.stop"))
    for members, struct, where in parts:
        for name in members.keys() - set(struct.__struct_fields__):
            raise BundleError(f"{source} is not a bundle of format {FORMAT}: unknown field `{name}` - at `$.{where}`")


def read_bundle(path: Path) -> Bundle:
    """The bundle in a file. Raises BundleError."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BUNDLE_BYTES:
                raise BundleError(f"{path} is larger than a bundle ever is, {MAX_BUNDLE_BYTES} bytes")
            data = file.read(MAX_BUNDLE_BYTES + 1)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_BUNDLE_BYTES:
        raise BundleError(f"{path} is larger than a bundle ever is, {MAX_BUNDLE_BYTES} bytes")
    return decode(data, source=str(path))


def _no_logprobs() -> Logprobs:
    return Logprobs(chosen=[], top_token_ids=[], top_logprobs=[])
