"""`reprise serve` with an engine that keeps to a pace, and with a watch on the event loop of the process around it.

The engine is the real one with its real model, and waits after each step, so that it makes so many tokens a second
and no more, and at most 50 of one stream: a load of known size reaches the process that serves HTTP, and the engine
leaves it its core.

    running_server(MODEL, module="benchmarks.paced_server", environ=environ(tokens_per_second, watch_file))

The watch sleeps for a moment again and again, and notes how late it wakes up; `read_watch` gives that after the end.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from array import array
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from reprise.engine.loader import LoadedModel
    from reprise.engine.model_runner import ModelRunner
    from reprise.engine.scheduler import Batch
    from reprise.engine.sequence import Sequence

ROOT = Path(__file__).resolve().parents[1]
STEP_SECONDS = 0.02
"""Of a step at least, where there is a pace: as many streams as are asked for run at once."""
TICK = 0.005
_RATE = "PACED_TOKENS_PER_SECOND"
_WATCH_FILE = "PACED_WATCH_FILE"


class Look(NamedTuple):
    """One waking of the watch: when, on the clock of `time.perf_counter`, and how many seconds too late."""

    when: float
    late: float
    cpu: float
    """Seconds of its lateness in which the event loop's own thread computed: the rest another process had the core."""


def environ(tokens_per_second: float, watch_file: Path) -> dict[str, str]:
    """The variables of a server at this pace, over all streams; 0 does not wait."""
    return {_RATE: str(tokens_per_second), _WATCH_FILE: str(watch_file), "PYTHONPATH": str(ROOT)}


def read_watch(file: Path) -> list[Look]:
    """What was noted, once the server has ended."""
    numbers = array("d", file.read_bytes())
    return [Look(*numbers[start : start + 3]) for start in range(0, len(numbers), 3)]


class PacedRunner:
    """A runner whose steps take as long as their new tokens are to take."""

    def __init__(self, runner: ModelRunner, tokens_per_second: float) -> None:
        self._runner = runner
        self._tokens_per_second = tokens_per_second
        self._due = 0.0

    def run(self, batch: Batch) -> Tensor:
        num_tokens = sum(scheduled.completes_pass for scheduled in batch)
        seconds = max(STEP_SECONDS, num_tokens / self._tokens_per_second)
        # What the step before took too much is made up for, what was lost before that is not.
        self._due = max(self._due, time.monotonic() - seconds) + seconds
        logits = self._runner.run(batch)
        time.sleep(max(0.0, self._due - time.monotonic()))
        return logits

    def forget(self, sequence: Sequence) -> None:
        self._runner.forget(sequence)


def run(tokens_per_second: float, sock: socket.socket, parent: int) -> None:
    """The entry point of an engine process, as `generation.engine_entry.run`."""
    from reprise.engine import process

    build_core = process.build_core

    def build_paced_core(loaded: LoadedModel, *arguments: Any) -> Any:
        if tokens_per_second:
            loaded.runner = PacedRunner(loaded.runner, tokens_per_second)
        return build_core(loaded, *arguments)

    setattr(process, "build_core", build_paced_core)  # noqa: B010 # mypy lets no function be replaced
    process.run_forked(sock, parent)


async def watch(noted: array[float]) -> None:
    while True:
        began, computed = time.perf_counter(), time.thread_time()
        await asyncio.sleep(TICK)
        now = time.perf_counter()
        late = max(0.0, now - began - TICK)
        noted.extend((now, late, min(late, time.thread_time() - computed)))


async def watched(file: Path, serve: Callable[..., Coroutine[Any, Any, int]], *arguments: Any) -> int:
    noted = array("d")
    watching = asyncio.create_task(watch(noted))
    try:
        return await serve(*arguments)
    finally:
        watching.cancel()
        file.write_bytes(noted.tobytes())  # noqa: ASYNC240 # nothing is served any more


def main() -> None:
    from benchmarks import paced_server
    from reprise import cli, serve

    serve._serve = partial(watched, Path(os.environ[_WATCH_FILE]), serve._serve)  # noqa: SLF001 # it has no hook
    serve.run = partial(serve.run, engine_entry=partial(paced_server.run, float(os.environ[_RATE])))
    cli.main()


if __name__ == "__main__":
    main()
