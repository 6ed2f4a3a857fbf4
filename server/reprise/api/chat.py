"""Chat: the request as generations, deltas as chunks, chunks as the full response."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from reprise.api.head import ResponseHead, UsageCount
from reprise.api.sampling import (
    CONFLICT,
    Served,
    check_request,
    check_size,
    requested_max_tokens,
    resolve_max_tokens,
    resolve_sampling,
    resolve_stop,
)
from reprise.errors import InvalidRequestError
from reprise.protocol.messages import Message
from reprise.protocol.parameters import ChatTemplateParameters
from reprise.protocol.requests import ChatCompletionRequest
from reprise.protocol.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    PositionLogprobs,
    RepriseExtension,
    TokenLogprob,
    Usage,
)
from reprise.text.tokenizer import Tokenizer
from reprise.types import ChoiceDelta, GenerationRequest, LogprobEntry, LogprobToken

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's value for it."""
RESERVED_TEMPLATE_VARIABLES = frozenset(
    {
        "add_generation_prompt",
        "bos_token",
        "chat_template",
        "cls_token",
        "continue_final_message",
        "conversation",
        "conversations",
        "documents",
        "eos_token",
        "mask_token",
        "max_length",
        "messages",
        "pad_token",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "self",
        "sep_token",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
        "unk_token",
    }
)


def check(request: ChatCompletionRequest, *, max_choices: int) -> None:
    """Refuse what is wrong before anything is rendered. Raises InvalidRequestError."""
    check_request(request)
    if (request.n or 1) > max_choices:
        raise InvalidRequestError(f"Invalid 'n': {request.n} must be at most {max_choices} on this server.", param="n")
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequestError("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    if requested_max_tokens(request) == 0:
        name = next(
            name for name in ("max_completion_tokens", "max_tokens", "max_new_tokens") if getattr(request, name) == 0
        )
        raise InvalidRequestError(f"Invalid '{name}': 0 must be at least 1.", param=name)
    check_template_parameters(request)


def check_template_parameters(request: ChatTemplateParameters) -> None:
    if request.continue_final_message and request.add_generation_prompt:
        raise InvalidRequestError(
            "'continue_final_message' goes on with the last message and 'add_generation_prompt' begins a "
            "new one: "
            "set one of them.",
            param="continue_final_message",
            code=CONFLICT,
        )
    reserved = sorted(RESERVED_TEMPLATE_VARIABLES.intersection(request.chat_template_kwargs or {}))
    if reserved:
        raise InvalidRequestError(
            f"'chat_template_kwargs.{reserved[0]}' cannot be set by a request.",
            param=f"chat_template_kwargs.{reserved[0]}",
        )


def encode_messages(
    messages: list[Message],
    request: ChatTemplateParameters,
    tokenizer: Tokenizer,
    *,
    add_special_tokens: bool,
) -> list[int]:
    """Token ids of messages by the model's chat template.

    Raises InvalidRequestError where it refuses them.
    """
    generation_prompt = request.add_generation_prompt
    if generation_prompt is None:
        generation_prompt = not request.continue_final_message
    token_ids = tokenizer.encode_chat(
        [for_template(message) for message in messages],
        add_generation_prompt=generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        **(request.chat_template_kwargs or {}),
    )
    if add_special_tokens:
        token_ids = tokenizer.encode("", add_special_tokens=True) + token_ids
    return token_ids


def for_template(message: Message) -> dict[str, Any]:
    """A message as chat templates know it: arguments of calls as objects, a refusal as what was said."""
    dumped: dict[str, Any] = message.model_dump(exclude_none=True)
    refusal = dumped.pop("refusal", None)
    if refusal is not None:
        dumped.setdefault("content", refusal)
    for call in dumped.get("tool_calls", []):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return dumped


def _num_bytes(messages: list[Message]) -> int:
    """Bytes of the messages' contents, which templates write out, up to spaces at their ends."""
    contents = [message.content for message in messages if message.content is not None]
    parts = [[content] if isinstance(content, str) else content for content in contents]
    texts = [part if isinstance(part, str) else getattr(part, part.type) for list_ in parts for part in list_]
    return sum(len(text.encode()) for text in texts)


def _arguments(written: str) -> object:
    """The object that a call's arguments are; what a model wrote may be no JSON, and stays as it is."""
    try:
        value = msgspec.json.decode(written)
    except (msgspec.DecodeError, RecursionError):
        return written
    return value if isinstance(value, dict) else written


def to_generation(
    request: ChatCompletionRequest, served: Served, *, response_id: str, seed: int
) -> list[GenerationRequest]:
    """The one generation of a checked request. Renders and tokenises: not for the event loop.

    Without a limit an answer may fill the context. Raises InvalidRequestError.
    """
    check_size(_num_bytes(request.messages), served, param="messages")
    token_ids = encode_messages(
        request.messages, request, served.tokenizer, add_special_tokens=bool(request.add_special_tokens)
    )
    max_tokens = resolve_max_tokens(request, len(token_ids), served, default=None, param="messages")
    num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return [
        GenerationRequest(
            request_id=response_id,
            prompt_token_ids=token_ids,
            sampling=resolve_sampling(request, served, seed=seed, max_tokens=max_tokens, num_logprobs=num_logprobs),
            num_choices=request.n or 1,
            stop=resolve_stop(request),
            skip_special_tokens=request.skip_special_tokens is not False,
        )
    ]


class ChatChunks:
    """Deltas of a response to its chunks: pushed one by one, then `end`."""

    def __init__(self, head: ResponseHead, request: ChatCompletionRequest, *, include_usage: bool) -> None:
        self._head = head
        self._usage_on_chunks = None if include_usage else UNSET
        self._logprobs = bool(request.logprobs)
        self._token_ids = bool(request.return_token_ids)
        self._count = UsageCount(head)
        self._begun: set[int] = set()
        self._extension: RepriseExtension | UnsetType = head.extension

    def push(self, delta: ChoiceDelta) -> list[ChatCompletionChunk]:
        """The chunks of a delta, one choice each: its role first, its finish reason last."""
        self._count.add(delta)
        choices = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            empty = ChatLogprobs([]) if self._logprobs else None
            choices.append(ChatChunkChoice(delta.index, ChatDelta("assistant", ""), empty))
        ids = delta.token_ids if self._token_ids and delta.token_ids else UNSET
        if delta.text or delta.logprobs or (ids and delta.finish_reason is None):
            logprobs = ChatLogprobs([_position(entry) for entry in delta.logprobs]) if delta.logprobs else None
            choices.append(ChatChunkChoice(delta.index, ChatDelta(content=delta.text), logprobs, token_ids=ids))
            ids = UNSET
        if delta.finish_reason is not None:
            reason, stopped = delta.finish_reason, delta.stop_reason
            choices.append(ChatChunkChoice(delta.index, ChatDelta(), None, reason, stopped, ids))
        return [self._chunk([choice]) for choice in choices]

    def end(self) -> list[ChatCompletionChunk]:
        """The chunk with the sums, where they were asked for."""
        if self._usage_on_chunks is UNSET:
            return []
        return [self._chunk([], self._count.usage())]

    def usage(self) -> Usage:
        return self._count.usage()

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatCompletionChunk:
        extension, self._extension = self._extension, UNSET
        return ChatCompletionChunk(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.system_fingerprint,
            choices=choices,
            usage=usage or self._usage_on_chunks,
            reprise=extension,
        )


class ChatFold:
    """Chunks of a response, usage included, to the response."""

    def __init__(self) -> None:
        self._choices: dict[int, ChatChoice] = {}
        self._texts: dict[int, list[str]] = {}
        self._first: ChatCompletionChunk | None = None
        self._usage: Usage | None = None

    def push(self, chunk: ChatCompletionChunk) -> None:
        self._first = self._first or chunk
        if isinstance(chunk.usage, Usage):
            self._usage = chunk.usage
        for new in chunk.choices:
            choice = self._choices.setdefault(new.index, ChatChoice(new.index, ChatMessage()))
            if new.delta.content is not UNSET:
                self._texts.setdefault(new.index, []).append(new.delta.content)
            if new.logprobs is not None:
                choice.logprobs = choice.logprobs or ChatLogprobs([])
                choice.logprobs.content.extend(new.logprobs.content)
            if new.token_ids is not UNSET:
                choice.token_ids = choice.token_ids or []
                choice.token_ids.extend(new.token_ids)
            if new.finish_reason is not None:
                choice.finish_reason = new.finish_reason
                choice.stop_reason = None if new.stop_reason is UNSET else new.stop_reason

    def result(self) -> ChatCompletion:
        """The response. Only for a fold of all chunks."""
        first = self._first
        if first is None or first.reprise is UNSET or self._usage is None:
            raise ValueError("these are not all chunks of a response with usage")
        for index, texts in self._texts.items():
            self._choices[index].message.content = "".join(texts)
        return ChatCompletion(
            id=first.id,
            created=first.created,
            model=first.model,
            system_fingerprint=first.system_fingerprint,
            choices=[self._choices[index] for index in sorted(self._choices)],
            usage=self._usage,
            reprise=first.reprise,
        )


def fold(chunks: Iterable[ChatCompletionChunk]) -> ChatCompletion:
    """The full response: what a client would put together from the stream."""
    folding = ChatFold()
    for chunk in chunks:
        folding.push(chunk)
    return folding.result()


def _position(entry: LogprobEntry) -> PositionLogprobs:
    token, top = entry.token, entry.top
    return PositionLogprobs(token.text, finite(token.logprob), list(token.data), [_likely(likely) for likely in top])


def _likely(token: LogprobToken) -> TokenLogprob:
    return TokenLogprob(token.text, finite(token.logprob), list(token.data))


def finite(logprob: float) -> float:
    """A log-probability as JSON can say it."""
    return max(LEAST_LOGPROB, logprob)
