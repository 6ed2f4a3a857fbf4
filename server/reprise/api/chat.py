"""Chat: the request as generations."""

from __future__ import annotations

from typing import Any

import msgspec

from reprise.api.sampling import (
    CONFLICT,
    Served,
    check_request,
    check_size,
    check_text_ids,
    resolve_max_tokens,
    resolve_sampling,
    resolve_stop,
)
from reprise.errors import ContextLengthError, InvalidRequestError
from reprise.protocol.messages import Message
from reprise.protocol.parameters import ChatTemplateParameters
from reprise.protocol.requests import ChatCompletionRequest
from reprise.text.tokenizer import Tokenizer
from reprise.types import GenerationRequest

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
    if not dumped.get("tool_calls"):
        # Templates ask whether it is there, and take the message for one of calls.
        dumped.pop("tool_calls", None)
    for call in dumped.get("tool_calls", []):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return dumped


def num_bytes(messages: list[Message]) -> int:
    """Bytes of the messages' contents, which templates write out, up to spaces at their ends."""
    contents = [message.content for message in messages if message.content is not None]
    parts = [[content] if isinstance(content, str) else content for content in contents]
    texts = [part if isinstance(part, str) else getattr(part, part.type) for list_ in parts for part in list_]
    return sum(len(text.encode()) for text in texts)


MAX_PREDICTION_TOKENS = 8192
"""Or the context, where that is shorter: each answer is followed through its prediction on the event loop."""


def encode_prediction(request: ChatCompletionRequest, served: Served) -> list[int]:
    """Token ids of what a request expects its answer to be; empty where it says nothing of it.

    Raises ContextLengthError where it is longer than the context or MAX_PREDICTION_TOKENS.
    """
    if request.prediction is None:
        return []
    content = request.prediction.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    limit, longest = min(served.max_sequence_tokens, MAX_PREDICTION_TOKENS), served.longest_token
    num_tokens = -(-len(text.encode(errors="surrogatepass")) // longest) if longest else 0
    token_ids: list[int] = []
    if num_tokens <= limit:
        token_ids = served.tokenizer.encode(text, add_special_tokens=False)
        check_text_ids(token_ids, served, param="prediction.content")
        num_tokens = len(token_ids)
    if num_tokens > limit:
        raise ContextLengthError(
            f"Invalid 'prediction.content': it has {num_tokens} tokens or more, and this server takes {limit}."
            " Shorten the prediction.",
            param="prediction.content",
        )
    return token_ids


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
    check_size(num_bytes(request.messages), served, param="messages")
    token_ids = encode_messages(
        request.messages, request, served.tokenizer, add_special_tokens=bool(request.add_special_tokens)
    )
    check_text_ids(token_ids, served, param="messages")
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
            prediction_token_ids=encode_prediction(request, served),
        )
    ]
