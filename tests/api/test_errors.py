from __future__ import annotations

import json
import logging

import pytest
from starlette.exceptions import HTTPException

from reprise.api.errors import HttpError, to_reply
from reprise.errors import (
    ContextLengthError,
    GenerationError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RepriseError,
    UnavailableError,
)
from support.loopback import Loopback
from support.scripted_engine import ScriptedEngine

CANARY = "canary-Xq7"


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (InvalidRequestError("no", param="n", code="c"), 400, "invalid_request_error", "n", "c"),
        (InvalidRequestError("no"), 400, "invalid_request_error", None, "invalid_value"),
        (ContextLengthError("long", param="prompt"), 400, "invalid_request_error", "prompt", "context_length_exceeded"),
        (ModelNotFoundError("none"), 404, "invalid_request_error", "model", "model_not_found"),
        (OverloadedError("full"), 429, "rate_limit_error", None, "rate_limit_exceeded"),
        (UnavailableError("away"), 503, "server_error", None, "service_unavailable"),
        (GenerationError("bad", code="numerical_error"), 500, "server_error", None, "numerical_error"),
        (GenerationError("bad", code="capacity"), 503, "server_error", None, "capacity"),
        (GenerationError("bad", code="request_timeout"), 504, "server_error", None, "request_timeout"),
        (GenerationError("no", code="no_admissible_token"), 400, "invalid_request_error", None, "no_admissible_token"),
        (HttpError(413, "large", code="request_too_large"), 413, "invalid_request_error", None, "request_too_large"),
        (HTTPException(404), 404, "invalid_request_error", None, "not_found"),
        (HTTPException(405), 405, "invalid_request_error", None, "method_not_allowed"),
        (HTTPException(418, "teapot"), 418, "invalid_request_error", None, "http_error"),
        (RuntimeError(CANARY), 500, "server_error", None, "internal_error"),
        (RepriseError(CANARY), 500, "server_error", None, "internal_error"),
    ],
)
def test_the_table(error: Exception, status: int, kind: str, param: str | None, code: str) -> None:
    reply = to_reply(error, request_id="req_1")
    assert reply.status == status
    body = json.loads(reply.body())["error"]
    assert body.keys() == {"message", "type", "param", "code"}
    assert (body["type"], body["param"], body["code"]) == (kind, param, code)
    assert body["message"][0].isupper()


@pytest.mark.parametrize("seconds", [0, 1, 30])
def test_retry_after_is_at_least_one(seconds: int) -> None:
    for error in (OverloadedError("full", retry_after=seconds), UnavailableError("away", retry_after=seconds)):
        assert to_reply(error, request_id="r").headers["retry-after"] == str(max(1, seconds))


def test_what_would_fail_again_is_not_to_be_retried() -> None:
    assert to_reply(GenerationError("x", code="numerical_error"), request_id="r").headers["x-should-retry"] == "false"
    assert to_reply(GenerationError("x", code="capacity"), request_id="r").headers["x-should-retry"] == "true"


def test_an_unforeseen_error_tells_its_request_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    try:
        raise RuntimeError(CANARY)
    except RuntimeError as error:
        reply = to_reply(error, request_id="req_17")
    assert "req_17" in reply.error.message
    assert CANARY not in reply.error.message
    assert "req_17" in caplog.text
    assert "RuntimeError" in caplog.text
    assert "test_errors.py" in caplog.text
    assert CANARY not in caplog.text


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [True, False])
async def test_no_log_and_no_error_repeats_a_prompt_or_an_answer(
    server: Loopback, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    engine.answer = CANARY
    chat = {"messages": [{"role": "user", "content": CANARY}], "stream": stream}
    assert CANARY in "".join((await server.post("/v1/chat/completions", chat)).text) or stream
    engine.enqueue([RuntimeError(CANARY)])
    await server.post("/v1/chat/completions", chat)
    for wrong in ({"temperature": CANARY}, {"messages": CANARY}, {"stop": [CANARY] * 99}, {"n": [CANARY]}):
        response = await server.post("/v1/chat/completions", {**chat, **wrong})
        assert response.status_code == 400
        assert CANARY not in response.text
    assert CANARY not in "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("masks", "param"),
    [
        ({"allowed_token_ids": [70], "bad_words": ["x"]}, "allowed_token_ids"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"min_tokens": 1}, None),
    ],
)
async def test_masks_that_leave_nothing_are_the_clients_doing(
    server: Loopback, engine: ScriptedEngine, masks: dict[str, object], param: str | None
) -> None:
    """Found out in the engine, whole and streamed."""
    for _ in range(2):
        engine.enqueue([GenerationError("the masks leave no token", code="no_admissible_token")])
    response = await server.post("/v1/completions", {"prompt": "a", **masks})
    assert response.status_code == 400
    *_, event, done = await server.stream("/v1/completions", {"prompt": "a", **masks})
    assert done == "[DONE]"
    for error in (response.json()["error"], event["error"]):
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert error["code"] == "no_admissible_token"
