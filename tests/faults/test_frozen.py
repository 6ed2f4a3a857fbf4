"""F04: the engine stands still, for a while or for ever, as a whole or in one step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from support.engine_processes import process_state
from support.fault_checks import Watched
from support.faulty_engine import Fault
from support.promise import InFlight, all_at_once, assert_same, mixed_streams

CALLS = mixed_streams(12, 60)
Start = Callable[..., Watched]
Once = Callable[..., Fault]


def test_f04_stopped_for_two_seconds(start_faulty: Start) -> None:
    """Nothing but latency."""
    watched = start_faulty()
    expected = all_at_once(watched.client, CALLS)
    engine = watched.engine
    with InFlight(watched.client, CALLS) as streams:
        streams.wait(lambda: streams.num_tokens > 60, lambda: os.kill(engine, signal.SIGSTOP))
        time.sleep(2)
        assert process_state(engine) == "T"
        assert streams.num_running >= 6
        os.kill(engine, signal.SIGCONT)
        assert_same(streams.answers(), expected)
    assert streams.longest_gap > 1.9
    assert (watched.count("engine_restarts"), watched.count("engine_hangs")) == (0, 0)
    assert watched.engine == engine
    watched.assert_clean()


def test_f04_stopped_for_ever(start_faulty: Start) -> None:
    """The heartbeat is missed, the stacks are told, the process is killed, the streams go on."""
    watched = start_faulty(flags=("--heartbeat-timeout", "1.5"))
    expected = all_at_once(watched.client, CALLS)
    engine = watched.engine
    with InFlight(watched.client, CALLS) as streams:
        streams.wait(lambda: streams.num_tokens > 60, lambda: os.kill(engine, signal.SIGSTOP))
        stopped = time.monotonic()
        assert watched.readiness_in_recovery()["status"] in ("recovering", "stalled")
        assert 1.0 < time.monotonic() - stopped < 15.0
        assert_same(streams.answers(), expected)
    assert (watched.count("engine_restarts"), watched.count("engine_hangs")) == (1, 1)
    assert process_state(engine) in ("", "Z")
    log = watched.server.log
    assert "most recent call first" in log
    assert "no sign of life" in log
    watched.assert_clean()


def test_f04_a_step_that_never_ends(start_faulty: Start, once: Once) -> None:
    """It beats its heart and gets nothing done: that is a hang as well."""
    watched = start_faulty(once("sleep", at_forward=20, seconds=600.0), flags=("--step-timeout", "1.5"))
    with InFlight(watched.client, CALLS) as streams:
        found = streams.answers()
    assert (watched.count("engine_restarts"), watched.count("engine_hangs")) == (1, 1)
    assert "most recent call first" in watched.server.log
    assert "finished no step" in watched.server.log
    assert_same(found, all_at_once(watched.client, CALLS))
    watched.assert_clean()


def test_a_slow_step_is_no_hang(start_faulty: Start, once: Once) -> None:
    """Longer than the heartbeat may be late, which it is not."""
    watched = start_faulty(once("sleep", at_forward=20, seconds=3.0), flags=("--heartbeat-timeout", "1.5"))
    with InFlight(watched.client, CALLS) as streams:
        found = streams.answers()
    assert streams.longest_gap > 2.9
    assert (watched.count("engine_restarts"), watched.count("engine_hangs")) == (0, 0)
    assert_same(found, all_at_once(watched.client, CALLS))
    watched.assert_clean()
