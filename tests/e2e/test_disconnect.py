"""A client that leaves frees its place at once, however it leaves."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from support.live_api import CHAT, COMPLETIONS, LiveApi
from support.live_servers import CONTEXT

NUM_TOKENS = CONTEXT - 100
PROMPT = {"prompt": "The quick brown fox"}
MESSAGES = {"messages": [{"role": "user", "content": "Hello!"}]}


def connect(api: LiveApi, path: str, **parameters: Any) -> socket.socket:
    """A connection with a request for thousands of tokens on its way."""
    body = json.dumps({"max_tokens": NUM_TOKENS, "ignore_eos": True, "seed": 1, **parameters}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", api.client.base_url.port or 0), timeout=20)
    connection.sendall(head.encode() + body)
    return connection


def finish(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    """RST, as from a killed client or a cut cable with a firewall behind it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("leave", [finish, reset])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(("path", "body"), [(CHAT, MESSAGES), (COMPLETIONS, PROMPT | {"n": 3})], ids=["chat", "n=3"])
def test_a_client_that_leaves(
    api: LiveApi, path: str, body: dict[str, Any], stream: bool, leave: Callable[[socket.socket], None]
) -> None:
    api.wait_idle()
    num_choices = body.get("n", 1)
    before = api.metrics()["generation_tokens_total"]
    connection = connect(api, path, stream=stream, **body)
    api.wait_running(num_choices)
    if stream:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    leave(connection)
    api.wait_idle()
    assert api.metrics()["generation_tokens_total"] - before < NUM_TOKENS * num_choices


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_with_a_request_in_the_queue(api: LiveApi, stream: bool) -> None:
    """The request before that is the one that runs."""
    api.wait_idle()
    before = api.metrics()["generation_tokens_total"]
    connection = connect(api, COMPLETIONS, stream=stream, **PROMPT)
    api.wait_running(1)
    head = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000"
    connection.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\n{head}\r\n\r\n{{".encode())
    finish(connection)
    api.wait_idle()
    assert api.metrics()["generation_tokens_total"] - before < NUM_TOKENS


def test_clients_that_leave_while_they_wait(api: LiveApi) -> None:
    """64 places, 192 sequences: who leaves the queue never starts, and the next one is served."""
    api.wait_idle()
    connections = [connect(api, COMPLETIONS, n=64, **PROMPT) for _ in range(3)]
    api.wait_until(lambda metrics: metrics["num_requests_waiting"] >= 128)
    for connection in connections:
        reset(connection)
    api.wait_idle()
    assert len(api.complete(max_tokens=4, ignore_eos=True).token_ids) == 4


def test_more_than_can_wait_is_refused(api: LiveApi) -> None:
    """64 places and 256 that may wait: 256 sequences leave no room for 128 more."""
    connections = [connect(api, COMPLETIONS, n=128, **PROMPT) for _ in range(2)]
    api.wait_until(lambda metrics: metrics["num_requests_waiting"] >= 192)
    response = api.post(COMPLETIONS, PROMPT | {"n": 128})
    assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(response.headers["retry-after"]) >= 1
    for connection in connections:
        finish(connection)
    api.wait_idle()
    assert len(api.complete(n=128, max_tokens=1).choices) == 128


def test_the_others_go_on(api: LiveApi) -> None:
    expected = api.complete(max_tokens=300, ignore_eos=True, seed=7).choices
    connections = [connect(api, COMPLETIONS, stream=True, **PROMPT) for _ in range(6)]
    api.wait_running(6)
    for connection in connections[:3]:
        reset(connection)
    assert api.complete(max_tokens=300, ignore_eos=True, seed=7).choices == expected
    for connection in connections[3:]:
        finish(connection)
    api.wait_idle()


def test_a_client_that_leaves_in_its_body(api: LiveApi) -> None:
    connection = socket.create_connection(("127.0.0.1", api.client.base_url.port or 0), timeout=20)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    connection.sendall(head.encode() + b'{"messages": [')
    reset(connection)
    assert api.complete(max_tokens=1).token_ids
