"""A server whose engine hangs, or dies whenever it is ready: what it logs, what /ready says, how it ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.local_server import LocalServer
from reprise.exit_code import ExitCode
from support.engine_processes import engine_pids
from support.faulty_engine import Fault
from support.faulty_server import start_faulty_server
from support.live_api import COMPLETIONS, LiveApi, assert_same, of_events
from support.loopback import events

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the engine's process is found in /proc")

FLAGS = ("--served-model-name", "tiny", "--num-threads", "1", "--kv-cache-memory", "16MiB")


def readiness(server: LocalServer) -> str | None:
    try:
        status: str = httpx.get(server.base_url + "/ready", timeout=5).json()["status"]
    except httpx.TransportError:
        return None
    return status


def test_a_server_whose_engine_is_killed_whenever_it_is_ready_ends_with_its_code(
    llama_directory: Path, start_live_server: Callable[..., LocalServer]
) -> None:
    server = start_live_server(str(llama_directory), *FLAGS)
    server.wait_until_ready()
    seen: set[str | None] = set()
    killed: set[int] = set()
    deadline = time.monotonic() + 60
    while server.process.poll() is None and time.monotonic() < deadline:
        seen.add(status := readiness(server))
        for pid in set(engine_pids(server)) - killed if status == "ready" else ():
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        time.sleep(0.01)
    assert server.process.wait(1) == ExitCode.ENGINE_LOST, server.log
    assert len(killed) == 4
    assert {"ready", "recovering", "failed"} <= seen
    assert "the engine is lost" in server.log


def test_open_streams_of_a_lost_engine_get_one_error(
    llama_directory: Path, start_live_server: Callable[..., LocalServer]
) -> None:
    server = start_live_server(str(llama_directory), *FLAGS)
    server.wait_until_ready()
    begun = threading.Event()

    def read() -> str:
        body = {"prompt": "The quick", "stream": True, "ignore_eos": True, "max_tokens": 4000}
        text = ""
        with httpx.stream("POST", server.base_url + COMPLETIONS, json=body, timeout=60) as response:
            for piece in response.iter_text():
                text += piece
                begun.set()
        return text

    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(read)
        assert begun.wait(30)
        llama_weights = llama_directory / "model.safetensors"
        moved = llama_weights.rename(llama_directory / "moved")
        try:
            for pid in engine_pids(server):
                os.kill(pid, signal.SIGKILL)
            text = stream.result(60)
            assert server.process.wait(10) == ExitCode.ENGINE_LOST, server.log
        finally:
            moved.rename(llama_weights)
    found: list[Any] = events(text)
    errors = [event for event in found if isinstance(event, dict) and "error" in event]
    assert [error["error"]["code"] for error in errors] == ["service_unavailable"]
    assert "Traceback" not in server.log


def test_an_engine_that_hangs_tells_where_and_is_replaced(llama_directory: Path, tmp_path: Path) -> None:
    body = {"prompt": "The quick", "seed": 5, "ignore_eos": True, "max_tokens": 300}
    body |= {"logprobs": 1, "return_token_ids": True}
    stop = Fault("stop", at_forward=400, times=1, counter=str(tmp_path / "stop"))
    sleep = Fault("sleep", seconds=600, at_forward=400, times=1, counter=str(tmp_path / "sleep"))
    flags = (*FLAGS, "--heartbeat-timeout", "2")
    server = start_faulty_server((stop, sleep), str(llama_directory), *flags, directory=tmp_path)
    try:
        server.wait_until_ready()
        with LiveApi(server) as api:
            expected = api.answer(COMPLETIONS, body)
            with api.client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as response:
                answer = of_events(events("".join(response.iter_text())))
            assert_same(answer.choices, expected.choices)
            metrics = api.metrics()
            assert metrics["engine_hangs_total"] == metrics["engine_restarts_total"] == 1
            assert (metrics["choices_recovered_total"], metrics["choices_lost_total"]) == (1, 0)
            assert 0 < metrics["last_recovery_seconds"] < 30
        assert "the engine process hangs and is killed: it has shown no sign of life" in server.log
        assert "most recent call first" in server.log
        assert "The quick" not in server.log
    finally:
        server.stop()
