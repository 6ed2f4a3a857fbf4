"""Live answers judged by OpenAI's own OpenAPI document, which is not part of this project."""

from __future__ import annotations

from typing import Any

import pytest

from support import openapi_document
from support.live_api import CHAT, COMPLETIONS, LiveApi
from support.loopback import events

pytestmark = pytest.mark.skipif(
    not openapi_document.is_available(),
    reason=f"{openapi_document.VARIABLE} does not name OpenAI's OpenAPI document",
)

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "The quick brown"}], "max_tokens": 12}
PROMPT: dict[str, Any] = {"prompt": "The quick brown", "max_tokens": 12}
COMMON: list[dict[str, Any]] = [
    {},
    {"n": 3, "seed": 1},
    {"temperature": 0},
    {"temperature": 2, "top_p": 0.5, "top_k": 40, "min_p": 0.01, "typical_p": 0.9},
    {"repetition_penalty": 1.2, "presence_penalty": 1, "frequency_penalty": -1},
    {"logit_bias": {"40": 100}},
    {"stop": ["e", "a"], "include_stop_str_in_output": True},
    {"stop": "\ufffd"},
    {"bad_words": ["e"]},
    {"stop_token_ids": list(range(60, 90))},
    {"ignore_eos": True, "min_tokens": 4},
    {"use_cache": False},
    {"return_token_ids": True, "skip_special_tokens": False},
    {"user": "somebody", "metadata": {"a": "b"}, "service_tier": "auto", "store": False},
    {"seed": None, "temperature": None, "n": None, "stop": None, "logit_bias": None, "max_tokens": None},
    {"max_completion_tokens": 1},
]
OF_CHAT: list[dict[str, Any]] = [
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 20, "n": 2},
    {"logprobs": True, "stop": ["e"]},
    {"logprobs": True, "logit_bias": {"40": 100, "41": -100}, "allowed_token_ids": [40, 41], "top_logprobs": 5},
    {"reasoning_effort": "low", "verbosity": "low", "tools": [], "response_format": {"type": "text"}},
    {"messages": [{"role": "developer", "content": "a"}, {"role": "user", "name": "b", "content": "c"}]},
]
OF_COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": ["a", "b"], "n": 2},
    {"prompt": [5, 6, 7]},
    {"prompt": [[5], [6, 7]]},
    {"prompt": ""},
    {"logprobs": 0},
    {"logprobs": 5, "n": 2, "stop": ["e"]},
    {"echo": True},
    {"echo": True, "logprobs": 3},
    {"echo": True, "logprobs": 1, "max_tokens": 0},
    {"best_of": 1},
]
CALLS = [(CHAT, HELLO | options) for options in COMMON + OF_CHAT] + [
    (COMPLETIONS, PROMPT | options) for options in COMMON + OF_COMPLETIONS
]
ERRORS: list[tuple[str, Any, int]] = [
    (CHAT, {}, 400),
    (CHAT, [], 400),
    (CHAT, HELLO | {"temperature": 9}, 400),
    (CHAT, HELLO | {"model": "nobody"}, 404),
    (CHAT, HELLO | {"tools": [{}]}, 400),
    (
        CHAT,
        HELLO | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
        400,
    ),
    (COMPLETIONS, {"prompt": [10**6]}, 400),
    (COMPLETIONS, {"prompt": [5] * 5000}, 400),
    (COMPLETIONS, {"prompt": "a", "bogus": 1}, 400),
    ("/v1/nothing", {}, 404),
    ("/v1/models", {}, 405),
    ("/tokenize", {}, 400),
    ("/detokenize", {"tokens": [-1]}, 400),
]


def _name(value: Any) -> str:
    return "+".join(value) if isinstance(value, dict) else str(value).removeprefix("/v1/")


@pytest.mark.parametrize(("path", "body"), CALLS, ids=_name)
def test_responses_and_chunks(api: LiveApi, path: str, body: dict[str, Any]) -> None:
    """`LiveApi.post` judges them; here is seen to it that there was something to judge."""
    assert api.post(path, body).json()["choices"]
    for options in ({}, {"stream_options": {"include_usage": True}}):
        found = events(api.post(path, body | {"stream": True} | options).text)
        assert found[-1] == "[DONE]"
        assert any(chunk["choices"] for chunk in found[:-1])


@pytest.mark.parametrize(("path", "body", "status"), ERRORS, ids=str)
def test_errors(api: LiveApi, path: str, body: Any, status: int) -> None:
    assert api.post(path, body).status_code == status


def test_errors_within_streams(api: LiveApi) -> None:
    word = api.post("/detokenize", {"tokens": [40]}).json()["prompt"]
    # The second token would complete the word: what fails at the first is refused before the stream.
    body = PROMPT | {"stream": True, "allowed_token_ids": [40], "bad_words": [2 * word]}
    assert "error" in events(api.post(COMPLETIONS, body).text)[-2]


def test_models(api: LiveApi) -> None:
    assert api.get("/v1/models").status_code == 200
    assert api.get("/v1/models/tiny").status_code == 200
    assert api.get("/v1/models/nobody").status_code == 404
