"""Request fields to token-level parameters: the one place of defaults, limits and conflicts."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

import msgspec

from reprise.errors import ContextLengthError, InvalidRequestError
from reprise.protocol.parameters import GenerationParameters
from reprise.text.tokenizer import Tokenizer
from reprise.types import SamplingParams, StopStrings

MAX_GENERATED_SEED = 2**53
"""Seeds that the server chooses are below this, so that they survive JavaScript's numbers."""
MAX_BAD_WORDS_BYTES = 16 * 1024
"""Of all bad words together: the engine keeps a kibibyte of automaton for each."""
MAX_IDS_TO_CHECK = 1000
"""Allowed ids that are compared with all bad words here: a few milliseconds."""
CONFLICT = "conflicting_parameters"
MASKS_LEAVE_NOTHING = "no_admissible_token"


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What requests are judged by: facts of the model that is served, and the server's limits."""

    tokenizer: Tokenizer
    max_sequence_tokens: int
    """Tokens of prompt and output together at most."""
    vocab_size: int
    """Ids below this may be sampled."""
    max_choices: int
    longest_token: int | None = None
    """Bytes that one token spells at most, where that is known."""
    defaults: Mapping[str, float | int]
    """Sampling fields that a request leaves out, where not OpenAI's defaults hold."""

    @property
    def num_token_ids(self) -> int:
        """Ids below this are tokens: the model has rows for them and the tokenizer knows them."""
        return min(self.vocab_size, self.tokenizer.vocabulary.size)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, of those that can be sampled."""
        return tuple(token_id for token_id in self.tokenizer.end_token_ids if token_id < self.vocab_size)


def choose_seed(request: GenerationParameters) -> int:
    """The request's seed, or a random one from 0 to 2**53 - 1."""
    return secrets.randbelow(MAX_GENERATED_SEED) if request.seed is None else request.seed


def ignored_parameters(request: GenerationParameters, *, has_key: bool, guesses: bool = True) -> list[str]:
    """Names of the fields that ask for something and change nothing.

    has_key: whether an idempotency key came with the request, so that its answer may be read again without a stream.
    guesses: whether this server computes guesses ahead.
    """
    ignored = [
        name
        for name, neutral in request.NO_EFFECT.items()
        if (value := getattr(request, name)) is not None and value not in neutral
    ]
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        ignored.append("stream_options.include_obfuscation")
    if request.retain_seconds and not (request.stream or has_key):
        ignored.append("retain_seconds")
    if not guesses and getattr(request, "prediction", None) is not None:
        ignored.append("prediction")
    return sorted(ignored)


def check_request(request: GenerationParameters) -> None:
    """Refuse what no model could serve. Raises InvalidRequestError."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("'stream_options' is only allowed with 'stream': true.", param="stream_options")
    max_tokens = requested_max_tokens(request)
    if request.min_tokens is not None and max_tokens is not None and request.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"Invalid 'min_tokens': {request.min_tokens} is more than the {max_tokens} tokens allowed at most.",
            param="min_tokens",
        )
    if request.do_sample is False and request.temperature:
        raise InvalidRequestError(
            f"'do_sample' false means temperature 0, and 'temperature' is {request.temperature:g}: leave one out.",
            param="do_sample",
            code=CONFLICT,
        )
    if request.do_sample is True and request.temperature == 0:
        raise InvalidRequestError(
            "'do_sample' true and 'temperature' 0, which is greedy, contradict each other: leave one out.",
            param="do_sample",
            code=CONFLICT,
        )


def requested_max_tokens(request: GenerationParameters) -> int | None:
    """The limit that a request sets by any of its names.

    `max_completion_tokens` wins over `max_tokens`, as at OpenAI. `max_new_tokens` is another name of
    `max_tokens`: if it differs from what else was given, that is an error.
    """
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if request.max_new_tokens is None:
        return limit
    for name in ("max_tokens", "max_completion_tokens"):
        other = getattr(request, name)
        if other is not None and other != request.max_new_tokens:
            raise InvalidRequestError(
                f"'max_new_tokens' is {request.max_new_tokens} and '{name}' is {other}: they mean the same, give one.",
                param="max_new_tokens",
                code=CONFLICT,
            )
    return request.max_new_tokens


def check_size(num_bytes: int, served: Served, *, param: str) -> None:
    """Refuse a prompt that cannot fit whatever its tokens are, without tokenising megabytes to find out.

    Raises ContextLengthError.
    """
    if served.longest_token and num_bytes > served.max_sequence_tokens * served.longest_token:
        least = -(-num_bytes // served.longest_token)
        raise ContextLengthError(
            f"This model's context is {served.max_sequence_tokens} tokens and the prompt has at least {least}. "
            "Shorten the prompt.",
            param=param,
        )


def check_num_ids(num_ids: int, served: Served, *, param: str) -> None:
    """Refuse more ids than the context holds before they are looked at one by one. Raises ContextLengthError."""
    if num_ids > served.max_sequence_tokens:
        raise ContextLengthError(
            f"This model's context is {served.max_sequence_tokens} tokens and the prompt has {num_ids}. "
            "Shorten the prompt.",
            param=param,
        )


def resolve_max_tokens(
    request: GenerationParameters, num_prompt_tokens: int, served: Served, *, default: int | None, param: str
) -> int:
    """How many tokens may be generated: what was asked for, or `default`, but never beyond the context.

    A limit larger than the room is lowered to the room, as agents ask for more than there is and break if
    that is refused; the choice then ends with "length". `min_tokens` raises the default, and is never lowered.
    default: None is the room. param: the field the prompt came from. Raises ContextLengthError where a prompt
    leaves no room for a token, or not for `min_tokens`.
    """
    room = served.max_sequence_tokens - num_prompt_tokens
    asked, least = requested_max_tokens(request), request.min_tokens or 0
    wanted = asked
    if asked is None and default is not None:
        wanted = max(default, least)
    if room < 0 or (room == 0 and wanted != 0):
        raise ContextLengthError(
            f"This model's context is {served.max_sequence_tokens} tokens and the prompt has "
            f"{num_prompt_tokens}, "
            "which leaves no room for an answer. Shorten the prompt.",
            param=param,
        )
    if least > room:
        raise ContextLengthError(
            f"Invalid 'min_tokens': {least} is more than the {room} tokens that the prompt leaves of this model's "
            f"context of {served.max_sequence_tokens}.",
            param="min_tokens",
        )
    return room if wanted is None else min(wanted, room)


def resolve_sampling(
    request: GenerationParameters,
    served: Served,
    *,
    seed: int,
    max_tokens: int,
    num_logprobs: int | None,
    num_prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Token-level parameters of a checked request.

    max_tokens: at least the request's `min_tokens`. Raises InvalidRequestError for ids outside the vocabulary,
    and for masks that leave no first token.
    """
    defaults = served.defaults
    greedy = request.do_sample is False
    top_k = _first(request.top_k, defaults.get("top_k"), 0)
    sampling = SamplingParams(
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        temperature=0.0 if greedy else float(_first(request.temperature, defaults.get("temperature"), 1.0)),
        top_p=float(_first(request.top_p, defaults.get("top_p"), 1.0)),
        top_k=max(0, int(top_k)),
        min_p=float(_first(request.min_p, defaults.get("min_p"), 0.0)),
        typical_p=float(_first(request.typical_p, defaults.get("typical_p"), 1.0)),
        repetition_penalty=float(_first(request.repetition_penalty, defaults.get("repetition_penalty"), 1.0)),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_logit_bias(request.logit_bias or {}, served),
        allowed_token_ids=_token_ids(request.allowed_token_ids, served, "allowed_token_ids"),
        bad_words=_bad_words(request, served),
        end_token_ids=() if request.ignore_eos else served.end_token_ids,
        stop_token_ids=_token_ids(request.stop_token_ids, served, "stop_token_ids") or (),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        use_cache=request.use_cache is not False,
    )
    _check_masks(sampling, served)
    return sampling


def mask_parameter(request: GenerationParameters) -> str | None:
    """The field that is to blame where a request's masks leave no token to choose."""
    if request.allowed_token_ids is not None:
        return "allowed_token_ids"
    return "bad_words" if request.bad_words else None


def _check_masks(sampling: SamplingParams, served: Served) -> None:
    """Raise InvalidRequestError where none of the allowed ids can be the first.

    Later ones show in the engine, and so do the first of more ids than MAX_IDS_TO_CHECK.
    """
    if sampling.allowed_token_ids is None or sampling.max_tokens == 0:
        return
    ends = {*sampling.end_token_ids, *sampling.stop_token_ids} if sampling.min_tokens else set()
    left = [token_id for token_id in sampling.allowed_token_ids if token_id not in ends]
    vocabulary = served.tokenizer.vocabulary
    spelt = (b"" if i in vocabulary.special_token_ids else vocabulary.data(i) for i in left)
    if len(left) > MAX_IDS_TO_CHECK or any(not any(word in data for word in sampling.bad_words) for data in spelt):
        return
    why = "contains one of 'bad_words'" if left else "would end the answer before 'min_tokens'"
    raise InvalidRequestError(
        f"'allowed_token_ids' leaves no token to begin with: each one {why}"
        f"{' or would end the answer before its time' if left and ends else ''}.",
        param="allowed_token_ids",
        code=MASKS_LEAVE_NOTHING,
    )


def resolve_stop(request: GenerationParameters) -> StopStrings:
    return StopStrings(tuple(request.stop or ()), bool(request.include_stop_str_in_output))


def check_token_ids(token_ids: Sequence[int], limit: int, param: str) -> None:
    """Raise InvalidRequestError naming the first id that is not below the limit."""
    if not token_ids or (max(token_ids) < limit and min(token_ids) >= 0):
        return
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < limit:
            raise InvalidRequestError(
                f"Invalid '{param}[{index}]': {token_id} is no token id of this model; they are 0 to {limit - 1}.",
                param=f"{param}[{index}]",
                code="token_id_out_of_range",
            )


def check_text_ids(token_ids: Sequence[int], served: Served, param: str) -> None:
    """Raise InvalidRequestError where a text has a token that the tokenizer knows and the model has no row for."""
    unknown = next((token_id for token_id in token_ids if token_id >= served.vocab_size), None)
    if unknown is not None:
        spelt = served.tokenizer.vocabulary.data(unknown).decode(errors="replace")
        raise InvalidRequestError(
            f"Invalid '{param}': its text has token {unknown}, {spelt!r}, of which the model knows nothing: its own"
            f" are 0 to {served.vocab_size - 1}. Leave it out.",
            param=param,
            code="token_id_out_of_range",
        )


def _token_ids(token_ids: list[int] | None, served: Served, param: str) -> tuple[int, ...] | None:
    if token_ids is None:
        return None
    check_token_ids(token_ids, served.num_token_ids, param)
    return tuple(dict.fromkeys(token_ids))


def _logit_bias(biases: Mapping[str, float], served: Served) -> dict[int, float]:
    limit = served.num_token_ids
    for token_id in biases:
        if int(token_id) >= limit:
            raise InvalidRequestError(
                f"Invalid 'logit_bias': {token_id} is no token id of this model; they are 0 to {limit - 1}.",
                param="logit_bias",
                code="token_id_out_of_range",
            )
    return {int(token_id): bias for token_id, bias in biases.items()}


def _bad_words(request: GenerationParameters, served: Served) -> tuple[bytes, ...]:
    """The bytes that the text must not contain.

    A leading space is dropped: the word goes with it or without it.
    """
    words = request.bad_words or []
    if words and request.skip_special_tokens is False:
        raise InvalidRequestError(
            "'bad_words' is for texts without special tokens: leave 'skip_special_tokens' out, or set it to true.",
            param="bad_words",
            code=CONFLICT,
        )
    if words and not served.tokenizer.vocabulary.exact:
        raise InvalidRequestError(
            "'bad_words' is not supported by this model: its tokenizer does not tell what each token spells.",
            param="bad_words",
            code="unsupported_parameter",
        )
    spelt = tuple(dict.fromkeys((word.lstrip(" ") or word).encode() for word in words))
    num_bytes = sum(map(len, spelt))
    if num_bytes > MAX_BAD_WORDS_BYTES:
        raise InvalidRequestError(
            f"'bad_words' has {num_bytes} bytes in all; at most {MAX_BAD_WORDS_BYTES} can be barred at once.",
            param="bad_words",
            code="too_many_values",
        )
    return spelt


def _first(*values: float | None) -> float:
    """The first value that is not None."""
    return next(value for value in values if value is not None)
