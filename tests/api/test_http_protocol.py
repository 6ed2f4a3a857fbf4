"""Connections that are slow, silent or malformed."""

from __future__ import annotations

import asyncio
import json
import logging
import time

import pytest

from reprise.api.http_protocol import MAX_QUEUED_BODY_BYTES, MAX_QUEUED_REQUESTS
from reprise.types import ChoiceDelta, FinishReason
from support.loopback import Loopback, Start, eventually
from support.scripted_engine import Item, ScriptedEngine

pytestmark = pytest.mark.anyio

HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n"
)


async def read_all(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(5):
        return await reader.read()


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nx-request-id: req_" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


async def test_deadlines_hold_where_a_client_has_a_month_to_read(start: Start) -> None:
    """More milliseconds than the kernel takes."""
    async with start(send_timeout=30 * 86_400, header_timeout=0.3) as server:
        assert (await server.get("/health")).status_code == 200
        reader, writer = await server.connect()
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_a_silent_connection_is_closed(start: Start) -> None:
    async with start(header_timeout=0.2) as server:
        began = time.monotonic()
        reader, writer = await server.connect()
        assert await read_all(reader) == b""
        assert 0.15 < time.monotonic() - began < 2
        writer.close()


@pytest.mark.parametrize("trickle", [b"GET /", b"\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nA: b"])
async def test_a_head_that_does_not_end(start: Start, trickle: bytes) -> None:
    """The deadline is absolute: another byte now and then does not move it."""
    async with start(header_timeout=0.3) as server:
        reader, writer = await server.connect()
        began = time.monotonic()
        reading = asyncio.create_task(read_all(reader))
        writer.write(trickle)
        while not reading.done() and time.monotonic() - began < 3:
            writer.write(b"\r\n" if trickle == b"\r\n\r\n" else b"x")
            await asyncio.sleep(0.05)
        answer = await reading
        assert error_of(answer) == (408, "request_timeout")
        assert time.monotonic() - began < 2
        writer.close()


async def test_a_body_that_does_not_end(start: Start) -> None:
    async with start(body_timeout=0.3) as server:
        reader, writer = await server.connect()
        writer.write(HEAD + b'{"prompt')
        assert error_of(await read_all(reader)) == (408, "request_timeout")
        writer.close()


async def test_a_second_head_that_does_not_end(start: Start) -> None:
    async with start(header_timeout=0.3) as server:
        reader, writer = await server.connect()
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b'{"status":"ok"}')
        writer.write(b"GET /hea")
        assert error_of(await read_all(reader)) == (408, "request_timeout")
        writer.close()


async def test_an_idle_connection_is_kept_and_then_closed(start: Start) -> None:
    async with start(header_timeout=0.2, idle_timeout=1) as server:
        reader, writer = await server.connect()
        for _ in range(2):
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b'{"status":"ok"}')
            await asyncio.sleep(0.4)
        began = time.monotonic()
        assert await read_all(reader) == b""
        assert time.monotonic() - began < 2
        writer.close()


@pytest.mark.parametrize("body", [b"x", b"x" + b"\r\n"], ids=["body", "and a line"])
async def test_a_body_that_follows_its_answer_makes_the_connection_idle(start: Start, body: bytes) -> None:
    async with start(header_timeout=10, body_timeout=10, idle_timeout=1) as server:
        reader, writer = await server.connect()
        writer.write(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n")
        assert b" 404 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(body)
        rest = await read_all(reader)
        assert rest.startswith(b"{")
        assert b"HTTP/1.1" not in rest
        writer.close()


async def test_a_head_begun_with_the_end_of_an_answered_body(start: Start) -> None:
    async with start(header_timeout=0.3) as server:
        reader, writer = await server.connect()
        writer.write(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n")
        assert b" 404 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"xGET /hea")
        _, _, second = (await read_all(reader)).partition(b"HTTP/1.1 ")
        assert error_of(b"HTTP/1.1 " + second) == (408, "request_timeout")
        writer.close()


async def test_a_long_answer_outlives_the_deadlines_of_receipt(start: Start) -> None:
    async with start(header_timeout=0.1, body_timeout=0.1, idle_timeout=1, request_timeout=0.5) as server:
        server.app.state.service.engine.enqueue(None)
        response = await server.post("/v1/completions", {"prompt": "a"})
        assert response.status_code == 504


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: yyyy\r\n" * 20_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 300_000,
    ],
    ids=["url", "header", "headers", "endless"],
)
async def test_a_head_that_is_too_large(server: Loopback, head: bytes) -> None:
    reader, writer = await server.connect()
    writer.write(head)
    assert error_of(await read_all(reader)) == (431, "header_too_large")
    # A peer that does not close its side is not waited for.
    connections = server.server.connections
    await eventually(lambda: not connections)
    writer.close()


@pytest.mark.parametrize(
    "data",
    [b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET /\xff\xfe HTTP/1.1\r\n\r\n"],
)
async def test_what_is_no_http(server: Loopback, data: bytes) -> None:
    reader, writer = await server.connect()
    writer.write(data)
    status, _, rest = (await read_all(reader)).partition(b"\r\n")
    assert status.startswith(b"HTTP/1.1 400 ")
    assert b"invalid_http" in rest
    writer.close()


async def test_idle_connections_keep_nobody_out(start: Start) -> None:
    async with start(header_timeout=1) as server:
        idle = [await server.connect() for _ in range(200)]
        assert (await server.get("/health")).status_code == 200
        async with asyncio.timeout(5):
            assert [await reader.read() for reader, _ in idle] == [b""] * 200
        for _, writer in idle:
            writer.close()


async def test_upgrades_are_answered_over_http_1(server: Loopback) -> None:
    reader, writer = await server.connect()
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n")
    assert b'{"status":"ok"}' in await reader.readuntil(b"}")
    writer.close()


async def test_pipelined_requests_are_answered_in_order(server: Loopback) -> None:
    reader, writer = await server.connect()
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    writer.write(one + one + last)
    answer = await read_all(reader)
    assert answer.count(b'{"status":"ok"}') == 2
    assert answer.rstrip().endswith(b"}")
    assert answer.rindex(b"version") > answer.rindex(b"status")
    writer.close()


STREAM = b'{"prompt": "a", "stream": true}'
STREAM_REQUEST = HEAD.replace(b"14", str(len(STREAM)).encode()) + STREAM


async def test_a_queued_request_has_its_time_when_its_turn_comes(start: Start, engine: ScriptedEngine) -> None:
    """Its body may come before, but its time does not run before, and nothing is said of it."""
    go_on = asyncio.Event()
    script: list[Item] = [ChoiceDelta(index=0, text="first"), go_on]
    engine.enqueue([*script, ChoiceDelta(index=0, text="last", finish_reason=FinishReason.STOP)])
    async with start(body_timeout=0.2, keep_alive_interval=0) as server:
        reader, writer = await server.connect()
        writer.write(STREAM_REQUEST)
        await reader.readuntil(b"first")
        writer.write(HEAD + b'{"prompt')
        await asyncio.sleep(0.5)
        go_on.set()
        rest, end, second = (await read_all(reader)).partition(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert b"last" in rest
        assert end
        assert b"HTTP/1.1" not in rest
        assert error_of(second) == (408, "request_timeout")
        writer.close()


async def test_a_queued_request_whose_body_comes_late_is_answered(start: Start, engine: ScriptedEngine) -> None:
    go_on = asyncio.Event()
    engine.enqueue([go_on, ChoiceDelta(index=0, finish_reason=FinishReason.STOP)])
    async with start(body_timeout=0.2, keep_alive_interval=0) as server:
        reader, writer = await server.connect()
        writer.write(STREAM_REQUEST)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD.replace(b"Host", b"Connection: close\r\nHost") + b'{"prompt"')
        await asyncio.sleep(0.5)
        writer.write(b': ""}')
        go_on.set()
        _, _, second = (await read_all(reader)).partition(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert second.startswith(b"HTTP/1.1 200 OK")
        writer.close()


async def test_a_head_begun_behind_an_answer_has_its_time_when_that_ends(start: Start, engine: ScriptedEngine) -> None:
    go_on = asyncio.Event()
    engine.enqueue([go_on, ChoiceDelta(index=0, finish_reason=FinishReason.STOP)])
    async with start(header_timeout=0.3, keep_alive_interval=0) as server:
        reader, writer = await server.connect()
        writer.write(STREAM_REQUEST)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"GET /hea")
        await asyncio.sleep(0.5)
        go_on.set()
        _, end, second = (await read_all(reader)).partition(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert end
        assert error_of(second) == (408, "request_timeout")
        writer.close()


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("behind", "num_answered"),
    [
        (HEALTH * (MAX_QUEUED_REQUESTS + 1), MAX_QUEUED_REQUESTS),
        (HEALTH + HEAD.replace(b"14", b"1000000") + b"x" * (MAX_QUEUED_BODY_BYTES + 1), 1),
    ],
    ids=["requests", "body"],
)
@pytest.mark.parametrize("leave", [True, False], ids=["leave", "stay"])
async def test_what_is_queued_is_bounded(
    start: Start, engine: ScriptedEngine, behind: bytes, num_answered: int, leave: bool
) -> None:
    """And so all is read, and it is noticed that the client leaves."""
    go_on = asyncio.Event()
    engine.enqueue([go_on, ChoiceDelta(index=0, text="one", finish_reason=FinishReason.STOP)])
    body = b'{"prompt": "a"}'
    async with start(keep_alive_interval=0) as server:
        reader, writer = await server.connect()
        writer.write(HEAD.replace(b"14", str(len(body)).encode()) + body)
        await eventually(lambda: engine.streams)
        writer.write(behind)
        (protocol,) = server.server.connections
        await eventually(lambda: protocol.pipeline)  # type: ignore[attr-defined]
        if leave:
            writer.close()
            await eventually(lambda: engine.streams[0].closed)
            await eventually(lambda: server.app.state.service.admission.num_reserved == 0)
        else:
            await eventually(lambda: protocol._refused)  # type: ignore[attr-defined]
            go_on.set()
            first, *others, refusal = (await read_all(reader)).split(b"HTTP/1.1 ")[1:]
            assert b'"one"' in first
            assert [other[:3] for other in others] == [b"200"] * num_answered
            assert b"retry-after: 1\r\n" in refusal
            assert error_of(b"HTTP/1.1 " + refusal) == (429, "rate_limit_exceeded")
            writer.close()


async def test_what_is_queued_within_the_bounds_is_answered(server: Loopback, engine: ScriptedEngine) -> None:
    engine.enqueue([go_on := asyncio.Event(), ChoiceDelta(index=0, finish_reason=FinishReason.STOP)])
    reader, writer = await server.connect()
    writer.write(STREAM_REQUEST)
    await reader.readuntil(b"\r\n\r\n")
    large = b'{"prompt": ""' + b" " * 20_000 + b"}"
    writer.write(HEALTH * (MAX_QUEUED_REQUESTS - 2))
    for connection in (b"keep-alive", b"close"):
        head = HEAD.replace(b"14", str(len(large)).encode())
        writer.write(head.replace(b"Host", b"Connection: " + connection + b"\r\nHost") + large)
    (protocol,) = server.server.connections
    await eventually(lambda: len(protocol.pipeline) == MAX_QUEUED_REQUESTS)  # type: ignore[attr-defined]
    go_on.set()
    assert (await read_all(reader)).count(b"HTTP/1.1 200 OK") == MAX_QUEUED_REQUESTS
    writer.close()


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (b"nonsense\r\n\r\n", (400, "invalid_http")),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", (431, "header_too_large")),
        (
            HEAD.replace(b"Content-Length: 14", b"Transfer-Encoding: chunked") + b"no number\r\n",
            (400, "invalid_http"),
        ),
    ],
    ids=["head", "large head", "body"],
)
async def test_a_refusal_waits_for_its_turn(
    server: Loopback, engine: ScriptedEngine, second: bytes, expected: tuple[int, str]
) -> None:
    """What was asked before is answered whole."""
    go_on = asyncio.Event()
    script: list[Item] = [ChoiceDelta(index=0, text="first"), go_on]
    engine.enqueue([*script, ChoiceDelta(index=0, text="last", finish_reason=FinishReason.STOP)])
    reader, writer = await server.connect()
    writer.write(STREAM_REQUEST)
    await reader.readuntil(b"first")
    writer.write(HEALTH + second)
    (protocol,) = server.server.connections
    await eventually(lambda: protocol._refused)  # type: ignore[attr-defined]
    go_on.set()
    rest, _, after = (await read_all(reader)).partition(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert b"last" in rest
    assert b"HTTP/1.1" not in rest
    answered, ok, refusal = after.partition(b'{"status":"ok"}')
    assert answered.startswith(b"HTTP/1.1 200 OK")
    assert ok
    assert error_of(refusal) == expected
    writer.close()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_who_leaves_with_a_request_in_the_queue_leaves_the_first_too(
    start: Start, engine: ScriptedEngine, stream: bool
) -> None:
    engine.enqueue(None)
    body = STREAM if stream else b'{"prompt": "a"}'
    async with start(keep_alive_interval=0.05) as server:
        _, writer = await server.connect()
        writer.write(HEAD.replace(b"14", str(len(body)).encode()) + body)
        await eventually(lambda: engine.streams)
        writer.write(HEAD + b'{"prompt')
        (protocol,) = server.server.connections
        await eventually(lambda: protocol.pipeline)  # type: ignore[attr-defined]
        writer.close()
        await eventually(lambda: engine.streams[0].closed)
        await eventually(lambda: server.app.state.service.admission.num_reserved == 0)
        assert len(engine.streams) == 1


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
        HEAD.replace(b"Content-Length: 14\r\n\r\n", b"Expect: 100-continue\r\n"),
    ],
    ids=["never reads", "asks to go on"],
)
async def test_what_is_refused_amid_its_body_is_answered_by_nobody_else(
    server: Loopback, head: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even by an application that does not ask for the body, or does so only now."""
    reader, writer = await server.connect()
    writer.write(head + b"Transfer-Encoding: chunked\r\n\r\nno number\r\n")
    assert error_of(await read_all(reader)) == (400, "invalid_http")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert 'status="500"' not in (await server.get("/metrics")).text
    writer.close()


async def test_a_url_that_is_none(server: Loopback) -> None:
    reader, writer = await server.connect()
    writer.write(b"GET http://[::1/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert error_of(await read_all(reader)) == (400, "invalid_http")
    writer.close()


async def test_continue_is_sent_for_a_body_that_will_be_read(server: Loopback) -> None:
    reader, writer = await server.connect()
    writer.write(HEAD.replace(b"Host", b"Expect: 100-continue\r\nConnection: close\r\nHost"))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
    writer.write(b'{"prompt": ""}')
    assert b"200 OK" in await read_all(reader)
    writer.close()


async def test_garbage_is_no_reason_to_warn(server: Loopback, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("uvicorn.error")
    for level, expected in ((logging.INFO, []), (logging.DEBUG, ["DEBUG"])):
        caplog.clear()
        with caplog.at_level(level, logger.name):
            reader, writer = await server.connect()
            writer.write(b"hello\r\n\r\n")
            assert error_of(await read_all(reader)) == (400, "invalid_http")
            writer.close()
        assert [r.levelname for r in caplog.records if "Invalid HTTP" in r.message] == expected
