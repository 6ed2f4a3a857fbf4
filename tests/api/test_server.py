"""Shutdown: by signal in a process of its own, and in this one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.local_server import free_port
from reprise.api.server import bind, count_requests
from reprise.errors import ConfigError
from reprise.settings import Settings
from reprise.types import ChoiceDelta, FinishReason
from support.loopback import Loopback, Start, events, eventually
from support.scripted_engine import ScriptedEngine
from support.tiny_tokenizers import add_start_token, byte_level, save_model

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "stream": True}


@asynccontextmanager
async def process(
    directory: Path, *, drain_timeout: float
) -> AsyncIterator[tuple[asyncio.subprocess.Process, httpx.AsyncClient]]:
    model, port = save_model(directory, add_start_token(byte_level())), free_port()
    paths = os.pathsep.join([str(ROOT / "server"), str(ROOT / "tests")])
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "support.scripted_server", str(model), str(port), str(drain_timeout)),
        env={**os.environ, "PYTHONPATH": paths},
        stdout=asyncio.subprocess.PIPE,
    )
    assert running.stdout is not None
    async with asyncio.timeout(60):
        assert await running.stdout.readline() == b"started\n"
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        try:
            yield running, client
        finally:
            if running.returncode is None:
                running.kill()
                await running.wait()


async def not_ready(client: httpx.AsyncClient) -> httpx.Response:
    """What /ready says once it stops saying yes."""
    async with asyncio.timeout(10):
        while (ready := await client.get("/ready")).status_code == 200:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.01)
    return ready


class Reading:
    """A stream that is being read; `begun` is set with its first token."""

    def __init__(self, client: httpx.AsyncClient, text: str) -> None:
        self.begun = asyncio.Event()
        self.text = ""
        self.task = asyncio.create_task(self._read(client, text))

    async def _read(self, client: httpx.AsyncClient, text: str) -> list[Any]:
        async with client.stream("POST", "/v1/chat/completions", json=chat(text)) as response:
            async for part in response.aiter_text():
                self.text += part
                if "begun" in self.text:
                    self.begun.set()
        return events(self.text)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_streams_finish(tmp_path: Path, number: signal.Signals) -> None:
    async with process(tmp_path, drain_timeout=20) as (server, client):
        reading = Reading(client, "wait")
        await reading.begun.wait()
        server.send_signal(number)
        ready = await not_ready(client)
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        assert (await client.get("/health")).status_code == 200
        refused = await client.post("/v1/chat/completions", json=chat("new"))
        assert refused.status_code == 503
        assert refused.headers["connection"] == "close"
        assert int(refused.headers["retry-after"]) >= 1
        assert not reading.task.done()
        server.send_signal(signal.SIGUSR1)
        told = await reading.task
        assert told[-1] == "[DONE]"
        assert told[-2]["choices"][0]["finish_reason"] == "stop"
        began = time.monotonic()
        assert await server.wait() == 0
        assert time.monotonic() - began < 15


async def test_after_the_drain_streams_are_told(tmp_path: Path) -> None:
    async with process(tmp_path, drain_timeout=0.3) as (server, client):
        reading = Reading(client, "wait")
        await reading.begun.wait()
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        told = await reading.task
        assert told[-1] == "[DONE]"
        assert told[-2]["error"]["code"] == "service_unavailable"
        assert await server.wait() == 1
        assert 0.25 < time.monotonic() - began < 15


async def test_a_second_signal_ends_the_drain(tmp_path: Path) -> None:
    async with process(tmp_path, drain_timeout=60) as (server, client):
        reading = Reading(client, "wait")
        await reading.begun.wait()
        server.send_signal(signal.SIGTERM)
        await not_ready(client)
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        told = await reading.task
        assert "error" in told[-2]
        assert await server.wait() == 1
        assert time.monotonic() - began < 15


async def test_an_idle_server_ends_at_once(tmp_path: Path) -> None:
    async with process(tmp_path, drain_timeout=60) as (server, client):
        assert (await client.get("/health")).status_code == 200
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
        assert time.monotonic() - began < 15


async def test_whole_answers_are_waited_for_too(start: Start, engine: ScriptedEngine) -> None:
    async with start(drain_timeout=0.2) as server:
        engine.enqueue(None)
        body = {**chat("hello"), "stream": False}
        asking = asyncio.create_task(server.post("/v1/chat/completions", body))
        await eventually(lambda: engine.streams)
        server.server.request_shutdown()
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "service_unavailable")
    assert server.exit_code == 1


@pytest.mark.parametrize("path", ["/v1/completions", "/detokenize"])
async def test_a_whole_answer_that_is_being_read_is_waited_for(
    path: str, start: Start, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that reads slowly: what it has not taken is no more lost than what is not computed."""
    monkeypatch.setattr("reprise.api.server.FAREWELL_SECONDS", 0.2)
    size = 24_000_000  # far more than the kernel takes for a client that does not read
    monkeypatch.setattr("reprise.api.tokens.to_detokenization", lambda *_: b'{"prompt": "' + b"x" * size + b'"}')
    engine.enqueue([ChoiceDelta(index=0, text="x" * size, finish_reason=FinishReason.STOP)])
    async with start() as server:
        body = json.dumps({"tokens": [5]} if path == "/detokenize" else {"prompt": "a"}).encode()
        reader, writer = await server.connect()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + body)
        first = await reader.read(4096)
        server.server.request_shutdown()
        await asyncio.sleep(1.0)
        service = server.app.state.service
        assert service.token_threads.num_admitted if path == "/detokenize" else not service.generations.idle.is_set()
        _, _, answer = (first + await reader.read()).partition(b"\r\n\r\n")
        assert len(answer) > size
        assert json.loads(answer)
        writer.close()
    assert server.exit_code == 0


async def test_a_refusal_while_draining_is_read_by_who_still_sends(start: Start, engine: ScriptedEngine) -> None:
    """The connection is to close. With bytes of the body unread it would be reset, and the answer lost with it."""
    async with start() as server:
        engine.enqueue(None)
        waiting = asyncio.create_task(server.post("/v1/chat/completions", {**chat("hello"), "stream": False}))
        await eventually(lambda: engine.streams)
        reader, writer = await server.connect()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        server.server.request_shutdown()
        await eventually(lambda: server.app.state.service.draining)
        writer.write(f"{head}\r\nContent-Length: 200000\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(10):
            writer.write(b" " * 20_000)
            await writer.drain()
            await asyncio.sleep(0.01)
        assert b"service_unavailable" in await reader.read()
        writer.close()
        waiting.cancel()


async def test_a_server_that_did_nothing_ends_well(server: Loopback) -> None:
    server.server.request_shutdown()
    await eventually(lambda: server.app.state.service.draining)


def test_a_taken_port_is_a_setting_to_change() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            bind(Settings(port=port))
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another --port or --host"
    )


def test_an_address_that_this_machine_has_not_is_left_out_beside_one_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `localhost` names one of IPv6 where that is switched off."""

    def found(*addresses: str) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found("192.0.2.1", "127.0.0.1"))
    (listener,) = bind(Settings())
    assert listener.getsockname()[0] == "127.0.0.1"
    listener.close()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found("192.0.2.1"))
    with pytest.raises(ConfigError, match="Cannot assign requested address"):
        bind(Settings())


def test_a_host_that_does_not_exist_is_a_setting_to_change() -> None:
    with pytest.raises(ConfigError, match=r"^cannot listen on nobody\.invalid port 8000: .+; choose another"):
        bind(Settings(host="nobody.invalid"))


def test_one_request_is_not_several() -> None:
    assert [count_requests(number, "running") for number in (0, 1, 2)] == [
        "0 requests are running",
        "1 request is running",
        "2 requests are running",
    ]


def has_both_loopbacks() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return socket.has_dualstack_ipv6()


@pytest.mark.skipif(not has_both_loopbacks(), reason="this machine has no IPv6")
def test_all_addresses_are_those_of_both_kinds() -> None:
    port = free_port()
    (listener,) = bind(Settings(host="::", port=port))
    for address in ("127.0.0.1", "::1"):
        socket.create_connection((address, port), timeout=10).close()
    listener.close()


def test_bind_listens_on_every_address_of_the_host() -> None:
    for host in ("127.0.0.1", "localhost"):
        port = free_port()
        listeners = bind(Settings(host=host, port=port))
        assert listeners
        for listener in listeners:
            assert listener.getsockname()[1] == port
            listener.close()
