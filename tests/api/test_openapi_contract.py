"""Answers judged by OpenAI's own document, which is not part of this project."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from reprise.errors import GenerationError
from reprise.types import ChoiceDelta, FinishReason
from support import openapi_document
from support.loopback import Loopback
from support.scripted_engine import ScriptedEngine

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        not openapi_document.is_available(),
        reason=f"{openapi_document.VARIABLE} does not name OpenAI's OpenAPI document",
    ),
]

CHAT = {"messages": [{"role": "user", "content": "Hello!"}]}
CHAT_VARIANTS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"logprobs": True, "top_logprobs": 2},
    {"max_tokens": 2, "return_token_ids": True},
    {"stream": True},
    {"stream": True, "n": 2, "logprobs": True, "stream_options": {"include_usage": True}},
]
COMPLETION_VARIANTS: list[dict[str, Any]] = [
    {"prompt": "Hello"},
    {"prompt": ["Hello", "there"], "n": 2},
    {"prompt": "Hello", "logprobs": 2},
    {"prompt": "Hello", "echo": True, "logprobs": 0, "max_tokens": 0},
    {"prompt": "Hello", "stream": True, "echo": True, "logprobs": 3, "stream_options": {"include_usage": True}},
]
ERRORS: list[tuple[str, str, Any]] = [
    ("GET", "/v1/nothing", None),
    ("GET", "/v1/completions", None),
    ("GET", "/v1/models/unknown", None),
    ("POST", "/v1/chat/completions", {"messages": []}),
    ("POST", "/v1/chat/completions", {"model": "unknown", **CHAT}),
    ("POST", "/v1/completions", []),
]


@pytest.mark.parametrize("variant", CHAT_VARIANTS)
async def test_chat(server: Loopback, variant: dict[str, Any]) -> None:
    response = await server.post("/v1/chat/completions", {**CHAT, **variant})
    assert response.status_code == 200


@pytest.mark.parametrize("variant", COMPLETION_VARIANTS)
async def test_completions(server: Loopback, variant: dict[str, Any]) -> None:
    response = await server.post("/v1/completions", variant)
    assert response.status_code == 200


async def test_models(server: Loopback) -> None:
    assert (await server.get("/v1/models")).status_code == 200
    assert (await server.get("/v1/models/test/model")).status_code == 200


@pytest.mark.parametrize(("method", "path", "body"), ERRORS)
async def test_errors(server: Loopback, method: str, path: str, body: Any) -> None:
    response = await server.request(method, path, json=body)
    assert 400 <= response.status_code < 500


async def test_error_in_a_stream(server: Loopback, engine: ScriptedEngine) -> None:
    engine.enqueue([ChoiceDelta(index=0, text="a"), GenerationError("broken", code="numerical_error")])
    events = await server.stream("/v1/chat/completions", CHAT)
    assert [event for event in events if "error" in event]


async def test_the_judge_judges() -> None:
    """A check that accepts everything would prove nothing."""
    wrong = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0}]}
    await asyncio.sleep(0)
    with pytest.raises(AssertionError, match="finish_reason"):
        openapi_document.check("CreateChatCompletionResponse", wrong)
    choice = {"index": 0, "message": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None}
    right = wrong | {"choices": [choice | {"finish_reason": FinishReason.STOP.value}]}
    openapi_document.check("CreateChatCompletionResponse", right)
    with pytest.raises(AssertionError, match="abort"):
        openapi_document.check(
            "CreateChatCompletionResponse", wrong | {"choices": [choice | {"finish_reason": "abort"}]}
        )
