"""A recorded request judged as one that a client sends: what is run again is what the normal route would have made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from reprise.api import chat, completions
from reprise.api.sampling import Served, check_token_ids
from reprise.api.validation import parse
from reprise.errors import BundleError, InvalidRequestError
from reprise.protocol.requests import CompletionRequest
from reprise.replay.bundle import Generation
from reprise.types import GenerationRequest


def check_replayable(generations: Sequence[Generation], served: Served) -> list[GenerationRequest]:
    """The requests of a bundle, every one within the ranges that hold for clients. Not for the event loop.

    Raises BundleError where one could not have come from a client of a server with this model and these limits.
    """
    num_choices = sum(generation.request.num_choices for generation in generations)
    if num_choices > served.max_choices:
        raise BundleError(f"the bundle has {num_choices} choices, and this server makes at most {served.max_choices}")
    return [_checked(generation.request, number, served) for number, generation in enumerate(generations)]


def _checked(recorded: GenerationRequest, number: int, served: Served) -> GenerationRequest:
    where = f"generations[{number}].request of the bundle cannot be run here"
    try:
        request = parse(CompletionRequest, json.dumps(as_completion(recorded)).encode())
        completions.check(request, max_choices=served.max_choices)
        made = completions.to_generation(request, served, response_id="", seed=recorded.sampling.seed)[0]
        _check_prediction(recorded.prediction_token_ids, served)
    except (InvalidRequestError, UnicodeDecodeError) as error:
        raise BundleError(f"{where}: {error}") from None
    # No completion has a prediction.
    taken_over = {name: getattr(recorded, name) for name in ("request_id", "prediction_token_ids")}
    made = msgspec.structs.replace(made, **taken_over)
    for name, value, here in _fields(recorded, made):
        if value != here:
            raise BundleError(f"{where}: its '{name}' is {_shown(value)}, and here it would be {_shown(here)}")
    return made


def _check_prediction(token_ids: list[int], served: Served) -> None:
    """Raise InvalidRequestError for a prediction that no chat could have made."""
    param, limit = "prediction_token_ids", min(served.max_sequence_tokens, chat.MAX_PREDICTION_TOKENS)
    if len(token_ids) > limit:
        message = f"Invalid '{param}': it has {len(token_ids)} tokens, and this server takes {limit}."
        raise InvalidRequestError(message, param=param)
    check_token_ids(token_ids, served.num_token_ids, param)


def as_completion(request: GenerationRequest) -> dict[str, Any]:
    """The body of the completion request that asks for a generation but for a prediction, nothing left to defaults."""
    sampling, stop = request.sampling, request.stop
    allowed = sampling.allowed_token_ids
    same = ("seed", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "typical_p", "use_cache",
            "repetition_penalty", "presence_penalty", "frequency_penalty")  # fmt: skip
    return {name: getattr(sampling, name) for name in same} | {
        "prompt": request.prompt_token_ids,
        "n": request.num_choices,
        "logit_bias": {str(token_id): bias for token_id, bias in sampling.logit_bias.items()},
        "allowed_token_ids": None if allowed is None else list(allowed),
        "bad_words": [word.decode() for word in sampling.bad_words],
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": not sampling.end_token_ids,
        "logprobs": sampling.num_logprobs,
        "echo": sampling.num_prompt_logprobs is not None,
        "stop": list(stop.strings),
        "include_stop_str_in_output": stop.include_in_output,
        "skip_special_tokens": request.skip_special_tokens,
    }


def _fields(one: GenerationRequest, other: GenerationRequest) -> list[tuple[str, object, object]]:
    pairs: tuple[tuple[msgspec.Struct, msgspec.Struct], ...] = ((one.sampling, other.sampling), (one, other))
    return [(name, getattr(a, name), getattr(b, name)) for a, b in pairs for name in a.__struct_fields__]


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 64 else text[:64] + "…"
