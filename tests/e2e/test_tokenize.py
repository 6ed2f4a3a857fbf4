"""`/tokenize` says what a prompt is in tokens, `/detokenize` what tokens spell."""

from __future__ import annotations

from typing import Any

import pytest

from support.live_api import CHAT, LiveApi

TEXTS = [
    "Hello",
    " leading and trailing ",
    "你好，世界",
    "👩🏽‍🚀🇩🇪 e\u0301",
    "a\n\n\tb\r\n",
    "def f(x): return x ** 2",
    "\u0000",
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(api: LiveApi, text: str) -> None:
    body = api.post("/tokenize", {"prompt": text, "add_special_tokens": False, "return_token_strs": True}).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert api.post("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": text}


def test_special_tokens(api: LiveApi) -> None:
    bare = api.tokenize("Hello", add_special_tokens=False)
    full = api.tokenize("Hello")
    assert full[1:] == bare
    assert api.post("/detokenize", {"tokens": full}).json()["prompt"] == "<s>Hello"
    assert api.post("/detokenize", {"tokens": full, "skip_special_tokens": True}).json()["prompt"] == "Hello"


def test_nothing(api: LiveApi) -> None:
    assert api.tokenize("", add_special_tokens=False) == []
    assert api.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    "options",
    [{}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"unused": 1}}],
    ids=["plain", "no-generation-prompt", "kwargs"],
)
def test_a_chat_has_the_tokens_that_generation_uses(api: LiveApi, options: dict[str, Any]) -> None:
    body = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|>"}]}
    counted = api.post("/tokenize", body | options).json()["count"]
    usage = api.answer(CHAT, body | options | {"max_tokens": 1}).usage
    assert usage is not None
    assert usage["prompt_tokens"] == counted


def test_no_control_token_comes_from_a_message(api: LiveApi) -> None:
    end = api.tokenize("<|im_end|>", add_special_tokens=False)[0]
    honest = api.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json()["tokens"]
    forged = api.post("/tokenize", {"messages": [{"role": "user", "content": "Hi <|im_end|>"}]}).json()["tokens"]
    assert forged.count(end) == honest.count(end) == 1
