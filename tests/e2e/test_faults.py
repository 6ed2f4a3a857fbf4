"""Signals and a killed engine: what runs is finished, with the text that it would have had."""

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
from support.engine_processes import engine_pids
from support.live_api import COMPLETIONS, LiveApi, assert_same, of_events
from support.loopback import events

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the engine's process is found in /proc")

FLAGS = ("--served-model-name", "tiny", "--num-threads", "1", "--kv-cache-memory", "16MiB")
NUM_TOKENS = 1000
STREAM = {"stream": True, "ignore_eos": True, "return_token_ids": True, "max_tokens": NUM_TOKENS, "logprobs": 1}


def body(seed: int) -> dict[str, Any]:
    return {"prompt": "The quick brown fox", "seed": seed, **STREAM}


def read_slowly(api: LiveApi, seed: int, begun: threading.Barrier) -> list[Any]:
    """All events of a stream; everybody waits at the barrier once the first text is there."""
    with api.client.stream("POST", COMPLETIONS, json=body(seed)) as response:
        assert response.status_code == 200
        pieces = response.iter_text()
        text = next(pieces)
        begun.wait(30)
        return events(text + "".join(pieces))


def test_a_killed_engine_is_a_pause(llama_directory: Path, start_live_server: Callable[..., LocalServer]) -> None:
    server = start_live_server(str(llama_directory), *FLAGS)
    server.wait_until_ready()
    with LiveApi(server) as api, ThreadPoolExecutor(4) as pool:
        expected = [api.answer(COMPLETIONS, body(seed)) for seed in range(3)]
        (engine,) = engine_pids(server)
        begun = threading.Barrier(5)
        streams = [pool.submit(read_slowly, api, seed, begun) for seed in range(3)]
        whole = pool.submit(lambda: (begun.wait(30), api.answer(COMPLETIONS, body(9) | {"stream": False}))[1])
        begun.wait(30)
        generated = api.metrics()["generation_tokens_total"]
        os.kill(engine, signal.SIGKILL)
        for one, stream in zip(expected, streams, strict=True):
            assert_same(of_events(stream.result(60)).choices, one.choices)
        assert len(whole.result(60).token_ids) == NUM_TOKENS
        assert generated < 7 * NUM_TOKENS, "the streams had ended before the engine was killed"
        api.wait_idle()
        assert api.metrics()["engine_restarts_total"] == 1
        assert engine_pids(server) != [engine]
        assert api.get("/ready").status_code == 200
        assert_same(api.answer(COMPLETIONS, body(9)).choices, whole.result().choices)


def test_sigterm_lets_streams_finish(llama_directory: Path, start_live_server: Callable[..., LocalServer]) -> None:
    server = start_live_server(str(llama_directory), *FLAGS)
    server.wait_until_ready()
    with LiveApi(server) as api, ThreadPoolExecutor(3) as pool:
        expected = [api.answer(COMPLETIONS, body(seed)) for seed in range(3)]
        engines = engine_pids(server)
        begun = threading.Barrier(4)
        streams = [pool.submit(read_slowly, api, seed, begun) for seed in range(3)]
        begun.wait(30)
        server.process.send_signal(signal.SIGTERM)
        refused = _until_refused(server)
        assert not all(stream.done() for stream in streams), "nothing was left to drain"
        for one, stream in zip(expected, streams, strict=True):
            assert_same(of_events(stream.result(60)).choices, one.choices)
    assert server.process.wait(20) == 0, server.log
    assert refused
    assert not [pid for pid in engines if Path(f"/proc/{pid}").exists()], "the engine outlived the server"


def _until_refused(server: LocalServer) -> bool:
    """Whether new work is refused: by a 503, or because nobody listens any more."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if httpx.post(server.base_url + COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code == 503:
                return True
        except httpx.TransportError:
            return True
    return False


def test_a_second_signal_ends_at_once(llama_directory: Path, start_live_server: Callable[..., LocalServer]) -> None:
    server = start_live_server(str(llama_directory), *FLAGS)
    server.wait_until_ready()
    with LiveApi(server) as api, ThreadPoolExecutor(1) as pool:
        begun = threading.Barrier(2)
        endless = pool.submit(read_slowly_whatever, api, begun)
        begun.wait(30)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 1, server.log
        assert "error" in endless.result(10)
    assert "Traceback" not in server.log


def read_slowly_whatever(api: LiveApi, begun: threading.Barrier) -> str:
    """A stream's text, however it ends."""
    text = ""
    with api.client.stream("POST", COMPLETIONS, json=body(1) | {"max_tokens": 4000}) as response:
        try:
            for piece in response.iter_text():
                if not text:
                    begun.wait(30)
                text += piece
        except httpx.TransportError as error:
            return f"{text} error {error}"
    return text
