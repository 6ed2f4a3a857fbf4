from __future__ import annotations

from typing import Any

import pytest

from reprise.text.tokenizer import Tokenizer
from support.loopback import Loopback
from support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "Hello"}]


async def test_a_prompt(server: Loopback, tokenizer: Tokenizer) -> None:
    body = (await server.post("/tokenize", {"prompt": "你好", "return_token_strs": True})).json()
    assert body["tokens"] == tokenizer.encode("你好", add_special_tokens=True)
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["token_strs"][0] == "<s>"
    assert body["max_model_len"] == 256
    bare = (await server.post("/tokenize", {"prompt": "你好", "add_special_tokens": False})).json()
    assert bare["tokens"] == body["tokens"][1:]


async def test_messages_are_what_generation_would_read(server: Loopback, engine: ScriptedEngine) -> None:
    body = (await server.post("/tokenize", {"messages": MESSAGES})).json()
    await server.post("/v1/chat/completions", {"messages": MESSAGES})
    assert body["tokens"] == engine.requests[0].prompt_token_ids


async def test_there_and_back(server: Loopback) -> None:
    text = "Hello, 世界! 🙂"
    tokens = (await server.post("/tokenize", {"prompt": text})).json()["tokens"]
    assert (await server.post("/detokenize", {"tokens": tokens})).json() == {"prompt": "<s>" + text}
    skipped = await server.post("/detokenize", {"tokens": tokens, "skip_special_tokens": True})
    assert skipped.json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"promt": "a"}, "promt"),
        ("/tokenize", {"messages": MESSAGES, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, 420]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
    ],
)
async def test_refusals(server: Loopback, path: str, body: dict[str, Any], param: str) -> None:
    response = await server.post(path, body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
