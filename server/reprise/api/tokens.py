"""`POST /tokenize` and `POST /detokenize`: what a prompt is in tokens, and back."""

from __future__ import annotations

from fastapi import Request, Response
from msgspec import UNSET

from reprise.api.body import json_response, read_request
from reprise.api.chat import check_template_parameters, encode_messages
from reprise.api.sampling import check_token_ids
from reprise.api.service import Service
from reprise.errors import InvalidRequestError
from reprise.protocol.requests import DetokenizeRequest, TokenizeRequest
from reprise.protocol.responses import Detokenization, Tokenization
from reprise.text.tokenizer import Tokenizer


async def tokenize(request: Request) -> Response:
    """The ids of a prompt, or of messages by the chat template, exactly as generation would use them."""
    service: Service = request.app.state.service
    body = await read_request(request, TokenizeRequest)
    service.model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("Give either 'prompt' or 'messages'.", param="prompt")
    check_template_parameters(body)
    tokens = await service.off_loop(to_token_ids, body, service.tokenizer)
    info, vocabulary = service.engine.info, service.tokenizer.vocabulary
    return json_response(
        Tokenization(
            count=len(tokens),
            max_model_len=None if info is None else info.max_model_len,
            tokens=tokens,
            token_strs=[vocabulary.data(token).decode(errors="replace") for token in tokens]
            if body.return_token_strs
            else UNSET,
        )
    )


def to_token_ids(body: TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    """Ids of a request that has either a prompt or messages."""
    if body.messages is not None:
        special = bool(body.add_special_tokens)
        return encode_messages(body.messages, body, tokenizer, add_special_tokens=special)
    return tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)


async def detokenize(request: Request) -> Response:
    """The text that ids spell."""
    service: Service = request.app.state.service
    body = await read_request(request, DetokenizeRequest)
    service.model_name(body.model)
    check_token_ids(body.tokens, service.tokenizer.vocabulary.size, "tokens")
    skip = bool(body.skip_special_tokens)
    text = await service.off_loop(service.tokenizer.decode, body.tokens, skip_special_tokens=skip)
    return json_response(Detokenization(text))
