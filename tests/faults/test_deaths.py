"""F01, F02, F03, F05: the engine's process ends, whenever and however it does. The clients see a pause."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.local_server import running_server
from support.engine_processes import engine_pids
from support.fault_checks import FLAGS, Watched
from support.faulty_engine import Fault
from support.live_api import COMPLETIONS
from support.promise import InFlight, all_at_once, assert_same, mixed_streams, token_ids

NUM_STREAMS = 12
CALLS = mixed_streams(NUM_STREAMS, 150)
SLOW = Fault("sleep", seconds=0.1)
"""Of every forward: so no stream ends before the test has killed what it means to kill."""
Start = Callable[..., Watched]
Once = Callable[..., Fault]


@pytest.fixture(
    scope="module",
    params=[pytest.param(dtype, marks=pytest.mark.xdist_group(f"deaths-{dtype}")) for dtype in ("float32", "bfloat16")],
)
def watched(
    request: pytest.FixtureRequest, wide_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("deaths")
    with running_server(str(wide_directory), *FLAGS, "--dtype", request.param, directory=directory) as server:
        watched = Watched(server)
        yield watched
        watched.close()


@pytest.fixture(scope="module")
def expected(watched: Watched) -> list[bytes]:
    return all_at_once(watched.client, CALLS)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 8, 13, 21, 34])
def test_f01_killed_after_so_many_tokens(watched: Watched, expected: list[bytes], num_tokens: int) -> None:
    deaths, recovered = watched.count("engine_restarts"), watched.count("choices_recovered")
    engine = watched.engine
    with InFlight(watched.client, CALLS) as streams:
        streams.wait(
            lambda: max(folded.num_tokens for folded in streams.folded) >= num_tokens,
            lambda: os.kill(engine, signal.SIGKILL),
        )
        readiness = watched.readiness_in_recovery()
        assert_same(streams.answers(), expected)
    assert readiness["status"] == "recovering"
    assert watched.count("engine_restarts") == deaths + 1
    assert watched.count("choices_recovered") >= recovered + NUM_STREAMS // 2
    assert watched.count("choices_lost") == 0
    watched.assert_clean()
    assert "Traceback" not in watched.server.log


def test_f02_killed_in_a_prefill(start_faulty: Start, once: Once) -> None:
    """In the very first forward, and in the middle of the prompts of the next life."""
    faults = (once("kill", at_forward=1), once("kill", at_forward=3))
    watched = start_faulty(*faults, flags=("--max-num-batched-tokens", "64"))
    with InFlight(watched.client, CALLS) as streams:
        found = streams.answers()
    assert watched.count("engine_restarts") == 2
    assert_same(found, all_at_once(watched.client, CALLS))
    watched.assert_clean()


def kill_every_child(watched: Watched, num_deaths: int) -> None:
    """Kill so many engines, each as soon as it is there."""
    killed: set[int] = set()
    deadline = time.monotonic() + 60
    while len(killed) < num_deaths and time.monotonic() < deadline and watched.server.process.poll() is None:
        for pid in set(engine_pids(watched.server)) - killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        time.sleep(0.002)


def test_f03_killed_again_while_recovering(start_faulty: Start) -> None:
    watched = start_faulty()
    expected = all_at_once(watched.client, CALLS)
    killing = threading.Thread(target=kill_every_child, args=(watched, 3))
    with InFlight(watched.client, CALLS) as streams:
        streams.wait(lambda: streams.num_tokens >= 5 * NUM_STREAMS, killing.start)
        killing.join()
        assert_same(streams.answers(), expected)
    assert watched.count("engine_restarts") == 3
    watched.assert_clean()


def test_f03_given_up_when_no_life_gets_anything_done(start_faulty: Start) -> None:
    watched = start_faulty(SLOW)
    killing = threading.Thread(target=kill_every_child, args=(watched, 100))
    with InFlight(watched.client, CALLS) as streams:
        streams.wait(lambda: streams.num_tokens >= NUM_STREAMS, killing.start)
        refused = refusals(watched)
        ended = streams.ends()
        killing.join()
    assert all(folded.error is not None and folded.num_ends == 1 for folded in ended)
    codes = {folded.error["code"] for folded in ended if folded.error is not None}
    assert codes == {"service_unavailable"}
    assert watched.server.process.wait(30) not in (0, -signal.SIGKILL)
    assert refused == [] or set(refused) == {503}
    assert "given up" in watched.server.log or "lost" in watched.server.log


def refusals(watched: Watched) -> list[int]:
    """What new requests got from the time on that the engine was given up until nobody answered."""
    found = []
    body = {"prompt": token_ids(3, 1), "max_tokens": 1}
    while watched.server.process.poll() is None:
        try:
            with httpx.Client(base_url=watched.server.base_url, timeout=60) as client:
                if client.get("/ready").status_code == 503 and "lost" in client.get("/ready").text:
                    found.append(client.post(COMPLETIONS, json=body).status_code)
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    return found


def test_f05_ended_by_itself(start_faulty: Start, once: Once) -> None:
    """One run through five ends: of the process, by signals and by exit code 0, and of the device's context."""
    actions = ("abort", "segfault", "exit", "accelerator", "kill")
    faults = [once(action, at_forward=at) for at, action in zip((9, 8, 7, 6, 5), actions, strict=True)]
    watched = start_faulty(*faults)
    with InFlight(watched.client, CALLS) as streams:
        found = streams.answers()
    assert watched.count("engine_restarts") == len(actions)
    assert_same(found, all_at_once(watched.client, CALLS))
    watched.assert_clean()
    log = watched.server.log
    for end in ("by SIGABRT", "by SIGSEGV", "by SIGKILL", "with exit code 0", "with exit code 1"):
        assert end in log


def test_an_idle_engine_that_dies_is_started_again(start_faulty: Start) -> None:
    watched = start_faulty()
    os.kill(watched.engine, signal.SIGKILL)
    assert watched.readiness_in_recovery()["status"] == "recovering"
    assert watched.count("engine_restarts") == 1
    watched.assert_clean()
    assert watched.api.complete("a", max_tokens=3, ignore_eos=True).choices[0].finish_reason == "length"
