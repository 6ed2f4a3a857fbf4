"""Completions: the request as generations."""

from __future__ import annotations

from typing import cast

import msgspec

from reprise.api.sampling import (
    Served,
    check_num_ids,
    check_request,
    check_size,
    check_text_ids,
    check_token_ids,
    resolve_max_tokens,
    resolve_sampling,
    resolve_stop,
)
from reprise.errors import InvalidRequestError
from reprise.protocol.requests import CompletionRequest
from reprise.types import GenerationRequest

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""
MAX_PROMPT_LOGPROBS = 2**19
"""Log-probabilities of all echoed prompts of a response, alternatives included: some 100 MB."""


def check(request: CompletionRequest, *, max_choices: int) -> None:
    """Refuse what is wrong before anything is tokenised. Raises InvalidRequestError."""
    check_request(request)
    if request.best_of is not None and request.best_of not in (1, request.n or 1):
        raise InvalidRequestError(
            f"'best_of' {request.best_of} is not supported: leave it out, or make it equal to 'n'.",
            param="best_of",
            code="unsupported_parameter",
        )
    num_prompts, num_choices = len(prompts_of(request)), request.n or 1
    if num_prompts * num_choices > max_choices:
        raise InvalidRequestError(
            f"{num_prompts} prompts times n = {num_choices} are {num_prompts * num_choices} choices, and "
            "this server "
            f"makes at most {max_choices} for a request. Send several requests.",
            param="prompt" if num_prompts > 1 else "n",
        )


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts as a list; one of no text where none was given."""
    prompt = request.prompt
    if prompt is None:
        return [""]
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    return cast("list[str | list[int]]", prompt)


def to_generation(
    request: CompletionRequest, served: Served, *, response_id: str, seed: int
) -> list[GenerationRequest]:
    """One generation a prompt of a checked request. Tokenises: not for the event loop.

    Generates 16 tokens at most where no limit is given. All prompts share the seed: a draw depends on the
    seed, the choice's number among its prompt's and the position, so a prompt that is given twice has the
    same answer twice. With `echo` the prompt's log-probabilities are computed as well. Raises
    InvalidRequestError.
    """
    prompts = [_encode(prompt, number, request, served) for number, prompt in enumerate(prompts_of(request))]
    _check_num_prompt_logprobs(prompts, request)
    limits = [
        resolve_max_tokens(request, len(token_ids), served, default=DEFAULT_MAX_TOKENS, param="prompt")
        for token_ids in prompts
    ]
    sampling = resolve_sampling(
        request,
        served,
        seed=seed,
        max_tokens=max(limits),
        num_logprobs=request.logprobs,
        num_prompt_logprobs=request.logprobs if request.echo else None,
    )
    return [
        GenerationRequest(
            request_id=f"{response_id}-{number}",
            prompt_token_ids=token_ids,
            sampling=msgspec.structs.replace(sampling, max_tokens=max_tokens),
            num_choices=request.n or 1,
            stop=resolve_stop(request),
            skip_special_tokens=request.skip_special_tokens is not False,
        )
        for number, (token_ids, max_tokens) in enumerate(zip(prompts, limits, strict=True))
    ]


def _check_num_prompt_logprobs(prompts: list[list[int]], request: CompletionRequest) -> None:
    if not request.echo or request.logprobs is None:
        return
    num_tokens, num_each = sum(map(len, prompts)) * (request.n or 1), 1 + request.logprobs
    if num_tokens * num_each > MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"Invalid 'logprobs': with 'echo', {num_tokens} tokens of the prompts of all choices have {num_each}"
            f" log-probabilities each, and a response has at most {MAX_PROMPT_LOGPROBS} of them. Ask for fewer"
            " alternatives, or send several requests.",
            param="logprobs",
            code="too_many_logprobs",
        )


def _encode(prompt: str | list[int], number: int, request: CompletionRequest, served: Served) -> list[int]:
    """Ids of one prompt; an empty one becomes the model's start tokens."""
    tokenizer = served.tokenizer
    if isinstance(prompt, str):
        check_size(len(prompt.encode()), served, param="prompt")
        add_special_tokens = request.add_special_tokens is not False
        token_ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens) if prompt else []
    else:
        check_num_ids(len(prompt), served, param="prompt")
        several = isinstance(request.prompt, list) and isinstance(request.prompt[0], list)
        check_token_ids(prompt, served.num_token_ids, f"prompt[{number}]" if several else "prompt")
        token_ids = prompt
    token_ids = token_ids or tokenizer.start_token_ids
    if not token_ids:
        raise InvalidRequestError(
            "The prompt is empty, and this model has no start token to generate from. Give it some text.",
            param="prompt",
        )
    check_text_ids(token_ids, served, param="prompt")
    return list(token_ids)
