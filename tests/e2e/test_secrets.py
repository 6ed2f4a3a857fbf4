"""What clients send stays with them: no log, metric or error repeats a prompt, an answer or a key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.local_server import LocalServer
from support.live_api import CHAT, COMPLETIONS, LiveApi
from support.live_servers import API_KEY

CANARY = "canary-Xq7vT2pLw8"
WRONG_KEY = "sk-canary-wrong-5d1e"


@pytest.fixture
def api(keyed_server: LocalServer) -> Iterator[LiveApi]:
    with LiveApi(keyed_server, api_key=API_KEY) as client:
        yield client


def bad_and_good(canary: str) -> list[tuple[str, Any]]:
    messages = [{"role": "user", "content": canary}]
    return [
        (CHAT, {"messages": messages, "max_tokens": 3}),
        (CHAT, {"messages": messages, "max_tokens": 3, "stream": True, "stop": canary, "user": canary}),
        (CHAT, {"messages": [{"role": canary, "content": canary}]}),
        (CHAT, {"messages": canary}),
        (CHAT, {"messages": [{"role": "user", "content": {"text": canary}}]}),
        (CHAT, {"messages": messages, "temperature": canary}),
        (CHAT, {"messages": messages, "chat_template_kwargs": {"messages": canary}}),
        (CHAT, {"messages": messages, "bad_words": [canary], "metadata": {"a": canary}, "max_tokens": 2}),
        (COMPLETIONS, {"prompt": canary, "max_tokens": 3, "n": 2}),
        (COMPLETIONS, {"prompt": [canary, 1]}),
        (COMPLETIONS, {"prompt": canary * 1000}),
        (COMPLETIONS, {"prompt": canary, "suffix": canary}),
        (COMPLETIONS, {"prompt": canary, "allowed_token_ids": [40], "logit_bias": {"40": -100}, "max_tokens": 2}),
        ("/tokenize", {"prompt": canary, "messages": messages}),
        ("/detokenize", {"tokens": [canary]}),
        (COMPLETIONS, canary),
    ]


def test_prompts_and_keys_appear_nowhere(api: LiveApi, keyed_server: LocalServer) -> None:
    echoed = api.complete(CANARY, echo=True, max_tokens=1)
    assert CANARY in echoed.text, "the canary lives"
    for path, body in bad_and_good(CANARY):
        response = api.post(path, body)
        assert response.status_code == 200 or CANARY not in response.text, response.text
    malformed = api.client.post(
        COMPLETIONS, content=f'{{"prompt": "{CANARY}'.encode(), headers={"content-type": "application/json"}
    )
    assert (malformed.status_code, CANARY in malformed.text) == (400, False)
    refused = api.client.post(COMPLETIONS, json={"prompt": CANARY}, headers={"authorization": f"Bearer {WRONG_KEY}"})
    assert (refused.status_code, WRONG_KEY in refused.text) == (401, False)
    api.client.get(f"/v1/{CANARY}?key={CANARY}")
    api.client.get("/health", headers={"x-request-id": CANARY, "user-agent": CANARY})
    shown = api.client.get("/metrics").text + keyed_server.log
    assert "reprise_requests_total" in shown
    for secret in (CANARY, API_KEY, WRONG_KEY):
        assert secret not in shown


def test_answers_are_not_logged(api: LiveApi, keyed_server: LocalServer) -> None:
    text = api.complete("Hello", max_tokens=40, seed=1, ignore_eos=True).text
    words = [word for word in text.replace("\ufffd", " ").split() if len(word) > 5]
    assert words
    for word in words:
        assert word not in keyed_server.log


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/tiny", "/metrics", "/version", "/openapi.json", "/v1/nothing"]
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {WRONG_KEY}"},
        {"authorization": f"Bearer {API_KEY.upper()}"},
        {"authorization": f"Bearer {API_KEY[:-1]}"},
        {"authorization": f"Basic {API_KEY}"},
        {"authorization": API_KEY},
        {"x-api-key": API_KEY},
    ],
    ids=["none", "empty", "no-key", "wrong", "upper", "shorter", "basic", "bare", "other-header"],
)
def test_a_key_is_needed(keyed_server: LocalServer, path: str, headers: dict[str, str]) -> None:
    with LiveApi(keyed_server) as stranger:
        response = stranger.client.get(path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert API_KEY not in json.dumps(dict(response.headers))


def test_probes_need_none(keyed_server: LocalServer) -> None:
    with LiveApi(keyed_server) as stranger:
        assert [stranger.client.get(path).status_code for path in ("/health", "/ready")] == [200, 200]
