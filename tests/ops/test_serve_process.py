"""`reprise serve` as a process: what it says, and how it ends."""

from __future__ import annotations

import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from benchmarks.local_server import LocalServer, start_server
from reprise.exit_code import ExitCode

Start = Callable[..., LocalServer]


def get(server: LocalServer, path: str) -> tuple[int, dict[str, object]] | None:
    """Status and body; None where nobody answers yet."""
    try:
        with urllib.request.urlopen(server.base_url + path, timeout=30) as response:  # noqa: S310 # our own address
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
    except (urllib.error.URLError, OSError):
        return None


def test_it_is_alive_while_it_loads_says_what_it_serves_and_ends_when_asked(start_live_server: Start) -> None:
    server = start_live_server("pocket", "--num-threads", "1")
    answers: list[tuple[int, dict[str, object]]] = []
    deadline = time.monotonic() + 120
    while (not answers or answers[-1][0] != 200) and server.process.poll() is None and time.monotonic() < deadline:
        alive = get(server, "/health")
        if alive is not None:
            assert alive[0] == 200
            answers += [answer] if (answer := get(server, "/ready")) else []
        time.sleep(0.01)
    assert answers[0][0] == 503
    assert answers[0][1]["status"] == "loading"
    assert answers[-1][0] == 200
    start = time.monotonic()
    assert server.stop() == ExitCode.OK
    assert time.monotonic() - start < 15
    records = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    stages = [record["message"] for record in records if record["message"].startswith("loading: ")]
    assert stages[0] == "loading: tokenizer"
    assert len(stages) == len(set(stages)) > 2
    (ready,) = [record for record in records if "engine" in record]
    assert ready["message"] == "serving pocket"
    assert ready["url"] == server.base_url
    assert ready["engine"]["architecture"] == "LlamaForCausalLM"
    assert ready["engine"]["num_kv_tokens"] > 0


def test_an_address_that_cannot_be_had_is_known_before_anything_is_loaded(start_live_server: Start) -> None:
    first = start_live_server("pocket")
    port = first.base_url.rpartition(":")[2]
    while "loading" not in first.log:
        assert first.process.poll() is None
        time.sleep(0.02)
    second = start_server("pocket", port=int(port))
    try:
        assert second.process.wait(60) == ExitCode.CONFIG
        assert port in second.log
        assert "loading" not in second.log
        assert "Traceback" not in second.log
    finally:
        second.stop()


def test_a_model_that_is_not_there_ends_with_its_cause(start_live_server: Start, tmp_path: Path) -> None:
    server = start_live_server(str(tmp_path / "nowhere"), "--log-format", "text")
    assert server.process.wait(120) == ExitCode.MODEL
    assert "cannot serve" in server.log
    assert "nowhere" in server.log
    assert "Traceback" not in server.log


def test_sigterm_while_loading_ends_it_soon(start_live_server: Start) -> None:
    server = start_live_server("pocket")
    while "loading" not in server.log:
        assert server.process.poll() is None
        time.sleep(0.02)
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) in (ExitCode.OK, -signal.SIGTERM)
    assert time.monotonic() - start < 10


def test_a_model_that_the_engine_refuses_ends_with_its_cause_alone(start_live_server: Start) -> None:
    server = start_live_server("pocket", "--max-model-len", "999999")
    assert server.process.wait(120) == ExitCode.MODEL
    records = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    (error,) = [record for record in records if record["level"] == "error"]
    assert "max_model_len 999999" in error["message"]
    assert "Traceback" not in server.log
