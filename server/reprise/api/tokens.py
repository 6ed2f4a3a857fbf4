"""`POST /tokenize` and `POST /detokenize`: what a prompt is in tokens, and back."""

from __future__ import annotations

from contextlib import ExitStack

import msgspec
from fastapi import Request, Response
from msgspec import UNSET

from reprise.api.body import SlicedResponse, check_content_type, read_request
from reprise.api.chat import check_template_parameters, encode_messages, num_bytes
from reprise.api.sampling import check_token_ids
from reprise.api.service import Service
from reprise.errors import InvalidRequestError
from reprise.protocol.requests import DetokenizeRequest, TokenizeRequest
from reprise.protocol.responses import Detokenization, Tokenization
from reprise.text.tokenizer import Tokenizer

MAX_TOKENS = 2**17
"""Ids that /detokenize takes, or the model's context where that is longer."""
MAX_BYTES_PER_TOKEN = 8
"""/tokenize takes so many bytes of text for each of them: several times what usual text has."""


def max_tokens(service: Service) -> int:
    info = service.engine.info
    return MAX_TOKENS if info is None else max(MAX_TOKENS, info.max_sequence_tokens)


async def _take_place(request: Request, service: Service) -> None:
    """Have a place until the answer is sent. Raises OverloadedError where there is none.

    The body comes first: it may come slowly.
    """
    service.token_threads.check_room()
    check_content_type(request)
    await request.body()
    cleanup: ExitStack = request.scope["state"]["cleanup"]
    cleanup.enter_context(service.token_threads.admitted())


async def tokenize(request: Request) -> Response:
    """The ids of a prompt, or of messages by the chat template, exactly as generation would use them.

    Raises OverloadedError where too many such requests are here.
    """
    service: Service = request.app.state.service
    await _take_place(request, service)
    body = await read_request(request, TokenizeRequest, service.token_threads)
    service.model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("Give either 'prompt' or 'messages'.", param="prompt")
    check_template_parameters(body)
    info = service.engine.info
    content = await service.token_threads.run(
        to_tokenization,
        body,
        service.tokenizer,
        max_bytes=MAX_BYTES_PER_TOKEN * max_tokens(service),
        max_model_len=None if info is None else info.max_model_len,
    )
    return SlicedResponse(content, media_type="application/json")


def to_tokenization(body: TokenizeRequest, tokenizer: Tokenizer, *, max_bytes: int, max_model_len: int | None) -> bytes:
    """The answer's JSON. Not for the event loop. Raises InvalidRequestError for a text of more than `max_bytes`."""
    _check_num_bytes(body, max_bytes)
    tokens, data = to_token_ids(body, tokenizer), tokenizer.vocabulary.data
    token_strs = [data(token).decode(errors="replace") for token in tokens] if body.return_token_strs else UNSET
    return msgspec.json.encode(Tokenization(len(tokens), max_model_len, tokens, token_strs))


def _check_num_bytes(body: TokenizeRequest, limit: int) -> None:
    param, found = "prompt", 0
    if body.messages is not None:
        param, found = "messages", num_bytes(body.messages)
    elif body.prompt is not None:
        found = len(body.prompt.encode())
    if found > limit:
        raise InvalidRequestError(
            f"Invalid '{param}': its text has {found} bytes, and at most {limit} are turned into tokens at once.",
            param=param,
            code="text_too_long",
        )


def to_token_ids(body: TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    """Ids of a request that has either a prompt or messages."""
    if body.messages is not None:
        special = bool(body.add_special_tokens)
        return encode_messages(body.messages, body, tokenizer, add_special_tokens=special)
    return tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)


async def detokenize(request: Request) -> Response:
    """The text that ids spell. Raises OverloadedError where too many such requests are here."""
    service: Service = request.app.state.service
    await _take_place(request, service)
    body = await read_request(request, DetokenizeRequest, service.token_threads)
    service.model_name(body.model)
    limit = max_tokens(service)
    if len(body.tokens) > limit:
        raise InvalidRequestError(
            f"Invalid 'tokens': {len(body.tokens)} ids, and at most {limit} are spelt at once.",
            param="tokens",
            code="too_many_tokens",
        )
    content = await service.token_threads.run(to_detokenization, body, service.tokenizer)
    return SlicedResponse(content, media_type="application/json")


def to_detokenization(body: DetokenizeRequest, tokenizer: Tokenizer) -> bytes:
    """The answer's JSON. Not for the event loop. Raises InvalidRequestError for ids outside the vocabulary."""
    check_token_ids(body.tokens, tokenizer.vocabulary.size, "tokens")
    text = tokenizer.decode(body.tokens, skip_special_tokens=bool(body.skip_special_tokens))
    return msgspec.json.encode(Detokenization(text))
