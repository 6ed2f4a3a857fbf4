"""Bodies that are too large, lie about their size, or are no JSON, over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from reprise.api import limits
from reprise.api.limits import LINGER_BYTES
from support.loopback import Loopback, Start, eventually
from support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}
LIMIT = 4 * 1024**2


async def exchange(server: Loopback, data: bytes, *, finish: bool = False) -> bytes:
    reader, writer = await server.connect()
    writer.write(data)
    if finish:
        writer.write_eof()
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("size", [LIMIT + 1, 10 * 1024**2])
async def test_a_declared_size_beyond_the_limit(server: Loopback, size: int) -> None:
    response = await server.request("POST", "/v1/completions", content=b"x" * size, headers=JSON)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (413, "request_too_large", None)
    assert str(LIMIT) in error["message"]
    assert response.headers["connection"] == "close"


async def test_chunks_beyond_the_limit(server: Loopback) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(160):
            yield b"x" * 65536

    response = await server.request("POST", "/v1/completions", content=chunks(), headers=JSON)
    assert response.status_code == 413


async def test_chunks_without_end_are_not_read_for_ever(server: Loopback) -> None:
    """Whether such a client sees its answer depends on whether it looks."""
    _, writer = await server.connect()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
    num_bytes = 0

    async def send_for_ever() -> None:
        nonlocal num_bytes
        while True:
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            await writer.drain()
            num_bytes += 65536

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(send_for_ever(), 10)
    assert num_bytes < 2 * LINGER_BYTES
    writer.close()


async def test_a_body_at_the_limit_is_read(start: Start) -> None:
    body = b'{"prompt": ""}'
    async with start(max_body_size=len(body)) as server:
        assert (await server.request("POST", "/v1/completions", content=body, headers=JSON)).status_code == 200
        larger = await server.request("POST", "/v1/completions", content=body + b" ", headers=JSON)
        assert larger.status_code == 413


async def test_all_bodies_together_are_bounded(
    start: Start, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_LARGEST_BODIES", 2)
    body = b'{"prompt": ""}'
    async with start(max_body_size=len(body)) as server:

        async def ask() -> int:
            return (await server.request("POST", "/v1/completions", content=body, headers=JSON)).status_code

        for _ in range(2):
            engine.enqueue(None)
        waiting = [asyncio.create_task(ask()) for _ in range(2)]
        await eventually(lambda: len(engine.streams) == 2)
        assert await ask() == 429
        for task in waiting:
            task.cancel()
        await eventually(lambda: all(stream.closed for stream in engine.streams))
        assert await ask() == 200


async def test_less_than_declared_is_no_request(server: Loopback, engine: ScriptedEngine) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    )
    assert await exchange(server, head + b'{"prompt": "a"}', finish=True) == b""
    assert not engine.requests


async def test_more_than_declared_is_another_request_and_none_that_is_right(server: Loopback) -> None:
    """It has its own answer, behind the first one's, and the connection ends."""
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 14\r\n\r\n"
    )
    answer = await exchange(server, head + b'{"prompt": ""}' + b"garbage \r\n\r\n")
    first, _, second = answer.partition(b"HTTP/1.1 400 ")
    assert first.startswith(b"HTTP/1.1 200 OK")
    assert b'"finish_reason":"stop"' in first
    assert b'"code":"invalid_http"' in second
    assert b"connection: close" in second


async def test_size_and_chunks_together_are_refused(server: Loopback) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    answer = await exchange(server, head + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"temperature": NaN}', "invalid_value"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b"[]", "invalid_type"),
        (b'"text"', "invalid_type"),
    ],
)
async def test_malformed_bodies(server: Loopback, body: bytes, code: str) -> None:
    response = await server.request("POST", "/v1/completions", content=body, headers=JSON)
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


@pytest.mark.parametrize(
    "content_type",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx"],
)
async def test_other_content_types(server: Loopback, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    response = await server.request("POST", "/v1/completions", content=b'{"prompt": ""}', headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
async def test_json_content_types(server: Loopback, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    response = await server.request("POST", "/v1/completions", content=b'{"prompt": ""}', headers=headers)
    assert response.status_code == 200


async def test_too_many_prompts(server: Loopback) -> None:
    response = await server.post("/v1/completions", {"prompt": ["a"] * 200})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "prompt")
    assert "200" in error["message"]
    assert (await server.post("/v1/completions", {"prompt": ["a"] * 100})).status_code == 200
    response = await server.post("/v1/completions", {"prompt": ["a"] * 3000})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


async def watch_loop(done: asyncio.Task[httpx.Response]) -> float:
    """The longest time, in seconds, that the server did not get to anything else."""
    slowest = 0.0
    while not done.done():
        began = time.monotonic()
        await asyncio.sleep(0.001)
        slowest = max(slowest, time.monotonic() - began)
    return slowest


async def test_a_large_prompt_does_not_hold_up_others(server: Loopback) -> None:
    """Parsing and tokenising megabytes happens beside the event loop."""
    loading = asyncio.create_task(server.post("/tokenize", {"prompt": "The quick brown fox. " * 49_000}))
    assert await watch_loop(loading) < 1
    assert loading.result().json()["count"] > 100_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x" * 3_000_000}),
        ("/v1/completions", {"prompt": [5] * 1_000_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 3_000_000}]}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 3_000_000}]}]},
        ),
    ],
)
async def test_a_hopeless_prompt_is_refused_quickly(server: Loopback, path: str, body: dict[str, Any]) -> None:
    began = time.monotonic()
    response = await server.post(path, body)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert time.monotonic() - began < 2
