"""Streams and clients that leave, over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

import pytest

from reprise.errors import GenerationError, UnavailableError
from reprise.types import ChoiceDelta, FinishReason
from support.loopback import Loopback, Start, eventually
from support.scripted_engine import Item, ScriptedEngine

pytestmark = pytest.mark.anyio

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
ENDPOINTS = [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "Hello"})]


def raw_request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def test_chat_stream(server: Loopback) -> None:
    events = await server.stream("/v1/chat/completions", CHAT)
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["id"].startswith("chatcmpl-")
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == "Hello, world!"
    assert all(delta.keys() == {"content"} for delta in deltas[1:-1])
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert ["reprise" in chunk for chunk in chunks] == [True] + [False] * (len(chunks) - 1)


async def test_usage_is_null_until_the_last_chunk(server: Loopback) -> None:
    events = await server.stream("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}})
    *chunks, last, done = events
    assert done == "[DONE]"
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 13
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 13


async def test_each_choice_has_its_own_role_and_finish(server: Loopback) -> None:
    events = await server.stream("/v1/chat/completions", {**CHAT, "n": 3})
    for index in range(3):
        own = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert own[-1]["finish_reason"] == "stop"
        assert sum(choice["finish_reason"] is not None for choice in own) == 1


async def test_prompts_times_choices(server: Loopback, engine: ScriptedEngine) -> None:
    events = await server.stream("/v1/completions", {"prompt": ["a", "b"], "n": 2, "seed": 7})
    assert {event["choices"][0]["index"] for event in events[:-1]} == {0, 1, 2, 3}
    assert [request.sampling.seed for request in engine.requests] == [7, 7]
    finished = [event for event in events[:-1] if event["choices"][0]["finish_reason"]]
    assert len(finished) == 4


async def test_stream_headers(server: Loopback) -> None:
    response = await server.post("/v1/chat/completions", {**CHAT, "stream": True, "seed": -5, "user": "u"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-reprise-seed"] == "-5"
    assert response.headers["x-reprise-ignored-parameters"] == "user"
    first = json.loads(response.text.split("\n")[0].removeprefix("data: "))
    assert first["reprise"] == {"seed": -5, "ignored_parameters": ["user"], "deterministic": True}


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GenerationError("not a number", code="numerical_error"), "numerical_error"),
        (UnavailableError("the engine is lost"), "service_unavailable"),
        (RuntimeError("secret detail"), "internal_error"),
    ],
)
async def test_an_error_in_a_stream_is_told_once(
    server: Loopback, engine: ScriptedEngine, path: str, body: dict[str, Any], error: Exception, code: str
) -> None:
    engine.enqueue([ChoiceDelta(index=0, text="a", token_ids=[5]), error])
    events = await server.stream(path, body)
    assert events[-1] == "[DONE]"
    assert [event["error"]["code"] for event in events[:-1] if "error" in event] == [code]
    assert "error" in events[-2]
    assert "secret" not in json.dumps(events)
    assert engine.streams[0].closed


async def test_a_generation_that_ends_early_is_an_error(server: Loopback, engine: ScriptedEngine) -> None:
    engine.enqueue([ChoiceDelta(index=0, text="a", token_ids=[5])])
    events = await server.stream("/v1/chat/completions", CHAT)
    assert events[-2]["error"]["code"] == "incomplete"
    engine.enqueue([ChoiceDelta(index=0, text="a", token_ids=[5])])
    response = await server.post("/v1/chat/completions", CHAT)
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"


async def test_errors_before_the_first_token_have_their_status(server: Loopback, engine: ScriptedEngine) -> None:
    response = await server.post("/v1/chat/completions", {**CHAT, "stream": True, "temperature": 9})
    assert response.status_code == 400
    long = {"messages": [{"role": "user", "content": "x" * 1000}], "stream": True}
    response = await server.post("/v1/chat/completions", long)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert not engine.requests


async def test_events_arrive_as_they_are_made(server: Loopback, engine: ScriptedEngine) -> None:
    """A buffering layer anywhere would hold the first token back."""
    go_on = asyncio.Event()
    script: list[Item] = [ChoiceDelta(index=0, text="first"), go_on]
    engine.enqueue([*script, ChoiceDelta(index=0, finish_reason=FinishReason.STOP)])
    async with server.client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        seen = ""
        async for text in response.aiter_text():
            seen += text
            if "first" in seen:
                go_on.set()
        assert seen.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
async def test_a_client_that_leaves_frees_its_place(
    server: Loopback, engine: ScriptedEngine, path: str, body: dict[str, Any], stream: bool, reset: bool
) -> None:
    """Queued, with nothing generated yet; whether the connection ends politely or not."""
    engine.enqueue(None)
    _, writer = await server.connect()
    writer.write(raw_request(path, {**body, "stream": stream}))
    await eventually(lambda: engine.streams)
    service = server.app.state.service
    assert service.admission.num_reserved == 1
    assert not engine.streams[0].closed
    if reset:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()
    await eventually(lambda: engine.streams[0].closed)
    await eventually(lambda: service.admission.num_reserved == 0 and not service.generations.read_now)


async def test_a_client_that_leaves_amid_its_stream(server: Loopback, engine: ScriptedEngine) -> None:
    never = asyncio.Event()
    engine.enqueue([ChoiceDelta(index=0, text="first"), never])
    engine.enqueue([ChoiceDelta(index=0, text="first"), never])
    body = {"prompt": ["a", "b"], "stream": True}
    async with server.client.stream("POST", "/v1/completions", json=body) as response:
        async for text in response.aiter_text():
            if "first" in text:
                break
    await eventually(lambda: all(stream.closed for stream in engine.streams))
    assert len(engine.streams) == 2
    await eventually(lambda: server.app.state.service.admission.num_reserved == 0)
    metrics = (await server.get("/metrics")).text
    assert 'reprise_requests_total{route="/v1/completions",status="499"} 1.0' in metrics


async def test_keep_alive_comments(start: Start, engine: ScriptedEngine) -> None:
    go_on = asyncio.Event()
    script: list[Item] = [ChoiceDelta(index=0, text="a"), go_on, ChoiceDelta(index=0, finish_reason=FinishReason.STOP)]
    engine.enqueue(script)
    async with start(keep_alive_interval=0.05) as server:
        asyncio.get_running_loop().call_later(0.2, go_on.set)
        response = await server.post("/v1/chat/completions", {**CHAT, "stream": True})
    assert ": keep-alive\n\n" in response.text
    assert response.text.endswith("data: [DONE]\n\n")


async def test_no_keep_alive_comments_where_switched_off(start: Start) -> None:
    async with start(keep_alive_interval=0) as server:
        response = await server.post("/v1/chat/completions", {**CHAT, "stream": True})
    assert not [line for line in response.text.split("\n") if line.startswith(":")]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_takes_too_long(start: Start, engine: ScriptedEngine, stream: bool) -> None:
    engine.enqueue(None)
    async with start(request_timeout=0.1) as server:
        response = await server.post("/v1/chat/completions", {**CHAT, "stream": stream})
        assert "request_timeout" in response.text
        assert response.status_code == (200 if stream else 504)
    assert engine.streams[0].closed


async def test_many_streams_at_once(server: Loopback) -> None:
    streams = await asyncio.gather(*(server.stream("/v1/chat/completions", CHAT) for _ in range(40)))
    assert all(events[-1] == "[DONE]" for events in streams)
    assert len({events[0]["id"] for events in streams}) == 40
    await eventually(lambda: server.app.state.service.admission.num_reserved == 0)


async def test_a_reader_that_stops_is_cut_off(start: Start, engine: ScriptedEngine) -> None:
    """Its tokens would otherwise hold their place for ever."""
    text = "x" * 65536
    engine.enqueue([*(ChoiceDelta(index=0, text=text) for _ in range(200)), asyncio.Event()])
    async with start(send_timeout=0.3, keep_alive_interval=0) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", server.port))
        request = raw_request("/v1/chat/completions", {**CHAT, "stream": True})
        await asyncio.get_running_loop().sock_sendall(connection, request)
        await eventually(lambda: engine.streams)
        await eventually(lambda: engine.streams[0].closed)
        await eventually(lambda: server.app.state.service.admission.num_reserved == 0)
        connection.close()
