"""Completions: the request as generations, deltas as chunks, chunks as the full response."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from msgspec import UNSET, UnsetType

from reprise.api.head import ResponseHead, UsageCount
from reprise.api.legacy_logprobs import LegacyLogprobsWriter, extend
from reprise.api.sampling import (
    Served,
    check_request,
    check_size,
    check_token_ids,
    resolve_max_tokens,
    resolve_sampling,
    resolve_stop,
)
from reprise.errors import InvalidRequestError
from reprise.protocol.requests import CompletionRequest
from reprise.protocol.responses import Completion, CompletionChoice, LegacyLogprobs, RepriseExtension, Usage
from reprise.text.vocabulary import Vocabulary
from reprise.types import ChoiceDelta, GenerationRequest

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


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
    num_prompt_logprobs = request.logprobs if request.echo else None
    generations = []
    for number, prompt in enumerate(prompts_of(request)):
        token_ids = _encode(prompt, number, request, served)
        max_tokens = resolve_max_tokens(request, len(token_ids), served, default=DEFAULT_MAX_TOKENS, param="prompt")
        sampling = resolve_sampling(
            request,
            served,
            seed=seed,
            max_tokens=max_tokens,
            num_logprobs=request.logprobs,
            num_prompt_logprobs=num_prompt_logprobs,
        )
        generations.append(
            GenerationRequest(
                request_id=f"{response_id}-{number}",
                prompt_token_ids=token_ids,
                sampling=sampling,
                num_choices=request.n or 1,
                stop=resolve_stop(request),
                skip_special_tokens=request.skip_special_tokens is not False,
            )
        )
    return generations


def _encode(prompt: str | list[int], number: int, request: CompletionRequest, served: Served) -> list[int]:
    """Ids of one prompt; an empty one becomes the model's start tokens."""
    tokenizer = served.tokenizer
    if isinstance(prompt, str):
        check_size(len(prompt.encode()), served, param="prompt")
        add_special_tokens = request.add_special_tokens is not False
        token_ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens) if prompt else []
    else:
        several = isinstance(request.prompt, list) and isinstance(request.prompt[0], list)
        check_token_ids(prompt, served.num_token_ids, f"prompt[{number}]" if several else "prompt")
        token_ids = prompt
    if token_ids:
        return token_ids
    if not tokenizer.start_token_ids:
        raise InvalidRequestError(
            "The prompt is empty, and this model has no start token to generate from. Give it some text.",
            param="prompt",
        )
    return list(tokenizer.start_token_ids)


def echoed_texts(request: CompletionRequest, vocabulary: Vocabulary) -> list[str]:
    """What `echo` puts before each prompt's choices: the prompt as it was given; ids are spelt out."""
    return [
        prompt
        if isinstance(prompt, str)
        else b"".join(vocabulary.data(token_id) for token_id in prompt).decode(errors="replace")
        for prompt in prompts_of(request)
    ]


class CompletionChunks:
    """Deltas of a response to its chunks: pushed one by one, then `end`."""

    def __init__(
        self,
        head: ResponseHead,
        request: CompletionRequest,
        generations: list[GenerationRequest],
        vocabulary: Vocabulary,
        *,
        include_usage: bool,
    ) -> None:
        self._head = head
        self._usage_on_chunks = None if include_usage else UNSET
        self._token_ids = bool(request.return_token_ids)
        self._generations = generations
        self._vocabulary = vocabulary
        self._echoes = echoed_texts(request, vocabulary) if request.echo else None
        self._logprobs = request.logprobs is not None
        self._writers: dict[int, LegacyLogprobsWriter] = {}
        self._count = UsageCount(head)
        self._begun: set[int] = set()
        self._extension: RepriseExtension | UnsetType = head.extension

    def push(self, delta: ChoiceDelta) -> list[Completion]:
        """The chunks of a delta: the echoed prompt before the first, then text and finish reason in one."""
        self._count.add(delta)
        choices = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            if self._echoes is not None:
                choices.append(self._echo(delta))
        if delta.text or delta.logprobs or delta.finish_reason is not None or (delta.token_ids and self._token_ids):
            choices.append(self._generated(delta))
        return [self._chunk([choice]) for choice in choices]

    def end(self) -> list[Completion]:
        """The chunk with the sums, where they were asked for."""
        if self._usage_on_chunks is UNSET:
            return []
        return [self._chunk([], self._count.usage())]

    def _echo(self, delta: ChoiceDelta) -> CompletionChoice:
        prompt_index = delta.index // self._head.num_choices
        text = self._echoes[prompt_index] if self._echoes is not None else ""
        logprobs = None
        if self._logprobs:
            prompt_ids = self._generations[prompt_index].prompt_token_ids
            entries = delta.prompt_logprobs or []
            logprobs = self._writer(delta.index).prompt(text, prompt_ids, entries)
        return CompletionChoice(delta.index, text, logprobs)

    def _generated(self, delta: ChoiceDelta) -> CompletionChoice:
        logprobs: LegacyLogprobs | None = None
        if self._logprobs:
            logprobs = self._writer(delta.index).generated(delta.logprobs or [])
        choice = CompletionChoice(delta.index, delta.text, logprobs)
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
            choice.stop_reason = delta.stop_reason
        if self._token_ids:
            choice.token_ids = delta.token_ids
        return choice

    def _writer(self, index: int) -> LegacyLogprobsWriter:
        return self._writers.setdefault(index, LegacyLogprobsWriter(self._vocabulary))

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        extension, self._extension = self._extension, UNSET
        return Completion(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.system_fingerprint,
            choices=choices,
            usage=usage or self._usage_on_chunks,
            reprise=extension,
        )


class CompletionFold:
    """Chunks of a response, usage included, to the response."""

    def __init__(self) -> None:
        self._choices: dict[int, CompletionChoice] = {}
        self._texts: dict[int, list[str]] = {}
        self._first: Completion | None = None
        self._usage: Usage | None = None

    def push(self, chunk: Completion) -> None:
        self._first = self._first or chunk
        if isinstance(chunk.usage, Usage):
            self._usage = chunk.usage
        for new in chunk.choices:
            choice = self._choices.setdefault(new.index, CompletionChoice(new.index, "", stop_reason=None))
            self._texts.setdefault(new.index, []).append(new.text)
            if new.logprobs is not None:
                choice.logprobs = extend(choice.logprobs, new.logprobs)
            if new.token_ids is not UNSET:
                choice.token_ids = choice.token_ids or []
                choice.token_ids.extend(new.token_ids)
            if new.finish_reason is not None:
                choice.finish_reason = new.finish_reason
                choice.stop_reason = new.stop_reason

    def result(self) -> Completion:
        """The response. Only for a fold of all chunks."""
        first = self._first
        if first is None or self._usage is None:
            raise ValueError("these are not all chunks of a response with usage")
        for index, texts in self._texts.items():
            self._choices[index].text = "".join(texts)
        return Completion(
            id=first.id,
            created=first.created,
            model=first.model,
            system_fingerprint=first.system_fingerprint,
            choices=[self._choices[index] for index in sorted(self._choices)],
            usage=self._usage,
            reprise=first.reprise,
        )


def fold(chunks: Iterable[Completion]) -> Completion:
    """The full response: what a client would put together from the stream."""
    folding = CompletionFold()
    for chunk in chunks:
        folding.push(chunk)
    return folding.result()
