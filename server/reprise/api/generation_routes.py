"""`POST /v1/chat/completions` and `POST /v1/completions`."""

from __future__ import annotations

from fastapi import Request, Response

from reprise.api import chat, completions
from reprise.api.chat_chunks import ChatChunks, ChatFold
from reprise.api.completion_chunks import CompletionChunks, CompletionFold
from reprise.api.head import ResponseHead
from reprise.api.respond import Endpoint, respond
from reprise.api.sampling import Served
from reprise.protocol.requests import ChatCompletionRequest, CompletionRequest
from reprise.protocol.responses import ChatCompletionChunk, Completion
from reprise.types import GenerationRequest


def _check_chat(request: ChatCompletionRequest, served: Served) -> int:
    chat.check(request, max_choices=served.max_choices)
    return request.n or 1


def _chat_chunks(
    head: ResponseHead,
    request: ChatCompletionRequest,
    generations: list[GenerationRequest],
    served: Served,  # noqa: ARG001 - the shape that both endpoints share
    *,
    include_usage: bool,
) -> ChatChunks:
    (generation,) = generations
    prediction_token_ids = generation.prediction_token_ids
    return ChatChunks(head, request, include_usage=include_usage, prediction_token_ids=prediction_token_ids)


def _check_completion(request: CompletionRequest, served: Served) -> int:
    completions.check(request, max_choices=served.max_choices)
    return len(completions.prompts_of(request)) * (request.n or 1)


def _completion_chunks(
    head: ResponseHead,
    request: CompletionRequest,
    generations: list[GenerationRequest],
    served: Served,
    *,
    include_usage: bool,
) -> CompletionChunks:
    return CompletionChunks(head, request, generations, served.tokenizer.vocabulary, include_usage=include_usage)


CHAT: Endpoint[ChatCompletionRequest, ChatCompletionChunk] = Endpoint(
    "chatcmpl", ChatCompletionRequest, _check_chat, chat.to_generation, _chat_chunks, ChatFold
)
COMPLETIONS: Endpoint[CompletionRequest, Completion] = Endpoint(
    "cmpl",
    CompletionRequest,
    _check_completion,
    completions.to_generation,
    _completion_chunks,
    CompletionFold,
)


async def create_chat_completion(request: Request) -> Response:
    """Answer the messages of a chat, at once or as a stream of events."""
    return await respond(request, CHAT)


async def create_completion(request: Request) -> Response:
    """Go on with one or several prompts, at once or as a stream of events."""
    return await respond(request, COMPLETIONS)
