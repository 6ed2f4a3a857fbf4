from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from reprise.api import tokens
from reprise.api.service import MAX_TOKEN_REQUESTS
from reprise.text.tokenizer import Tokenizer
from support.loopback import Loopback, eventually
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


async def test_a_long_text_is_refused(server: Loopback) -> None:
    limit = tokens.MAX_TOKENS * tokens.MAX_BYTES_PER_TOKEN
    for body, param in (
        ({"prompt": "a" * (limit + 1)}, "prompt"),
        ({"messages": [{"role": "user", "content": "é" * (limit // 2 + 1)}]}, "messages"),
    ):
        error = (await server.post("/tokenize", body)).json()["error"]
        assert (error["code"], error["param"]) == ("text_too_long", param)
        assert str(limit) in error["message"]
    error = (await server.post("/detokenize", {"tokens": [5] * (tokens.MAX_TOKENS + 1)})).json()["error"]
    assert (error["code"], error["param"]) == ("too_many_tokens", "tokens")


async def test_what_is_not_sent_as_json_is_refused_before_its_body_comes(server: Loopback) -> None:
    reader, writer = await server.connect()
    writer.write(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n\r\n")
    assert b" 415 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()


async def test_bodies_that_come_slowly_take_no_places(server: Loopback) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    writers = [(await server.connect())[1] for _ in range(MAX_TOKEN_REQUESTS)]
    for writer in writers:
        writer.write(head)
    await asyncio.sleep(0.2)
    assert (await server.post("/tokenize", {"prompt": "a"})).status_code == 200
    for writer in writers:
        writer.close()


async def test_too_many_of_them_are_refused_and_hold_up_no_chat(server: Loopback) -> None:
    service = server.app.state.service
    hold = threading.Event()
    blocking = asyncio.create_task(service.token_threads.run(hold.wait))
    asking = [asyncio.create_task(server.post("/tokenize", {"prompt": "a"})) for _ in range(MAX_TOKEN_REQUESTS + 4)]
    try:
        await eventually(lambda: sum(task.done() for task in asking) == 4)
        refused = [task.result() for task in asking if task.done()]
        assert {response.status_code for response in refused} == {429}
        assert all(response.headers["retry-after"] for response in refused)
        assert (await server.post("/detokenize", {"tokens": [5]})).status_code == 429
        assert (await server.post("/v1/chat/completions", {"messages": MESSAGES})).status_code == 200
    finally:
        hold.set()
        await blocking
    answers = await asyncio.gather(*asking)
    assert sorted(response.status_code for response in answers) == [200] * MAX_TOKEN_REQUESTS + [429] * 4
    assert (await server.post("/tokenize", {"prompt": "a"})).status_code == 200
    assert service.token_threads.num_admitted == 0
