"""Kill -9 of the engine at random moments under concurrent streams, each of which is compared byte by byte.

Prints how often the engine was started again, how many choices went on after it, and the longest pause of a stream.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.local_server import running_server
from support.engine_processes import engine_pids
from support.fault_checks import FLAGS, Watched, until
from support.live_api import Call
from support.live_servers import save_long_context
from support.promise import Folded, all_at_once, differences, mixed_streams, read_stream

SEED = 20261121
SHARE_WHILE_STARTING = 0.25
"""Of kills: those that hit an engine which has not delivered anything yet."""
SETTLING_SECONDS = 0.6


class Traffic:
    """Streams of `calls` in turn, so many at a time; where one ends another begins."""

    def __init__(self, watched: Watched, calls: Sequence[Call]) -> None:
        self._watched = watched
        self._calls = calls
        self._lock = threading.Lock()
        self._running: list[Folded] = []
        self._num_tokens_ended = 0
        self.ended: list[tuple[int, Folded]] = []
        """With the number of the call."""

    @property
    def num_tokens(self) -> int:
        with self._lock:
            return self._num_tokens_ended + sum(folded.num_tokens for folded in self._running)

    @contextmanager
    def flowing(self, num_streams: int) -> Iterator[None]:
        """While the block lasts; what runs at its end is read to its own."""
        numbers = itertools.cycle(range(len(self._calls)))
        stopping = threading.Event()

        def keep_reading() -> None:
            while not stopping.is_set():
                with self._lock:
                    number, folded = next(numbers), Folded()
                    self._running.append(folded)
                read_stream(self._watched.client, self._calls[number], folded)
                with self._lock:
                    self._running.remove(folded)
                    self._num_tokens_ended += folded.num_tokens
                    self.ended.append((number, folded))

        with ThreadPoolExecutor(num_streams) as pool:
            readers = [pool.submit(keep_reading) for _ in range(num_streams)]
            try:
                yield
            finally:
                stopping.set()
            for reader in readers:
                reader.result(120)


def kill(watched: Watched, delay: float) -> None:
    """Kill the engine that is there, or is there next, after `delay` seconds. Returns when it is gone."""
    until(lambda: len(engine_pids(watched.server)) == 1)
    engine = watched.engine
    time.sleep(delay)
    os.kill(engine, signal.SIGKILL)
    until(lambda: engine not in engine_pids(watched.server))


def kill_at_random(watched: Watched, traffic: Traffic, num_kills: int, num_streams: int) -> int:
    """Kill so many engines; never three in a row that had done nothing. Returns how many were starting."""
    generator = random.Random(SEED)
    num_starting = num_in_a_row = 0
    for _ in range(num_kills):
        if num_in_a_row < 2 and generator.random() < SHARE_WHILE_STARTING:
            num_in_a_row += 1
            num_starting += 1
            kill(watched, generator.uniform(0, 0.15))
        else:
            num_in_a_row = 0
            enough = traffic.num_tokens + 2 * num_streams
            until(lambda enough=enough: traffic.num_tokens > enough, seconds=60)  # type: ignore[misc]  # bound now
            kill(watched, generator.uniform(0, SETTLING_SECONDS))
    return num_starting


def sweep(
    directory: Path, flags: tuple[str, ...], log_directory: Path, *, num_kills: int, num_streams: int, num_tokens: int
) -> str:
    """Kill and compare. Returns what is to be told."""
    with running_server(str(directory), *FLAGS, *flags, directory=log_directory) as server:
        watched = Watched(server)
        calls = mixed_streams(2 * num_streams, num_tokens)
        expected = all_at_once(watched.client, calls[:num_streams]) + all_at_once(watched.client, calls[num_streams:])
        traffic = Traffic(watched, calls)
        with traffic.flowing(num_streams):
            num_starting = kill_at_random(watched, traffic, num_kills, num_streams)
        answers = [folded.answer() for _, folded in traffic.ended]
        different = differences(answers, [expected[number] for number, _ in traffic.ended])
        assert not different, [traffic.ended[index][0] for index in different]
        assert len(traffic.ended) >= num_streams
        assert watched.count("engine_restarts") == num_kills
        assert watched.count("choices_lost") == watched.count("requests_convicted") == 0
        recovered = watched.count("choices_recovered")
        assert recovered > num_kills
        watched.assert_clean()
        watched.close()
    longest = max(folded.longest_gap for _, folded in traffic.ended)
    return (
        f"{num_kills} kills, {num_starting} of them of an engine that was starting: {num_kills} restarts,"
        f" {recovered} choices went on; {len(answers)} streams with {traffic.num_tokens} tokens, all with the same"
        f" bytes as without kills; longest gap {longest:.2f} s"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_thirty_kills(dtype: str, wide_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--dtype", dtype)
    told = sweep(wide_directory, flags, tmp_path, num_kills=30, num_streams=16, num_tokens=300)
    with capsys.disabled():
        print(f"\n{dtype}: {told}")  # noqa: T201 # the figures are what this is for


@pytest.mark.parametrize("architecture", ["falcon", "mamba"])
def test_kills_on_the_padded_tier(architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save_long_context(tmp_path / architecture, architecture)
    flags = ("--dtype", "float32", "--deterministic")
    told = sweep(directory, flags, tmp_path, num_kills=6, num_streams=8, num_tokens=100)
    with capsys.disabled():
        print(f"\n{architecture}, padded tier: {told}")  # noqa: T201 # as above
