"""What the server around the model costs: CPU time of the API process for streamed tokens, and how late its loop is.

A real server with a model of near-zero cost, over HTTP. Its engine keeps to a number of tokens a second over all
streams, so that nearly every token is an event of its own: where an engine is faster than its readers, tokens are
merged into fewer events, which cost less. Rows without a pace show how fast it goes then. All streams of a row begin
at once. For each row:

- streams that failed or were not complete, and how many were open at once;
- tokens, and events, for each second of CPU time (user and system) that the API process took, and the share of a core
  that it took meanwhile;
- how late the event loop of the API process is for what comes at any moment, in milliseconds: a task in it sleeps
  for 5 ms again and again. `CPU` is what is left of it on a core of its own: the time in which the loop's thread
  computed, without that in which another process had the core.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.local_server import running_server
from benchmarks.paced_server import TICK, Look, environ, read_watch
from benchmarks.raw_stream import Answer, stream
from benchmarks.report import figure_text, percentiles, print_report
from benchmarks.shapes import write_model

SHAPE = "tiny"
PROMPT_TOKENS = 8
BUSY = 0.5
"""A load average above it is said."""


@dataclass(frozen=True)
class Cell:
    """So many streams at once; `tokens_per_second` over all of them, 0 for as many as there can be."""

    streams: int
    tokens: int
    tokens_per_second: float


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, its threads included; Linux only.

    POSIX' `clock_getcpuclockid`: `/proc/PID/stat` counts in ticks of 10 ms, in which this server streams 200 tokens.
    """
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise OSError(error, f"no CPU clock of process {pid}: {os.strerror(error)}")
    return time.clock_gettime(clock.value)


async def run_streams(base_url: str, cell: Cell) -> list[Answer]:
    """All streams of a cell, begun at once."""

    def body(number: int) -> dict[str, Any]:
        return {
            "model": "benchmark",
            "prompt": [1 + number % 255] * PROMPT_TOKENS,
            "max_tokens": cell.tokens,
            "min_tokens": cell.tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    return list(await asyncio.gather(*(stream(base_url, body(number)) for number in range(cell.streams))))


def most_at_once(answers: Sequence[Answer]) -> int:
    """Streams that had begun to answer and had not ended, when they were most."""
    edges = [(answer.first, 1) for answer in answers if answer.first is not None]
    edges += [(answer.end, -1) for answer in answers if answer.first is not None]
    most = count = 0
    for _, change in sorted(edges):
        count += change
        most = max(most, count)
    return most


def lateness(late: Iterable[float]) -> dict[str, float | None]:
    """Milliseconds for what comes at any moment: while the watch is late, further looks would have been due."""
    waits = [(seconds - n * TICK) * 1e3 for seconds in late for n in range(int(seconds / TICK) + 1)]
    return percentiles(waits, (0.5, 0.99, 1))


def measure(directory: Path, cell: Cell) -> dict[str, Any]:
    """One cell on a server of its own, after a few streams that do not count."""
    watch_file = directory / "watch"
    with running_server(
        str(directory), "--served-model-name", "benchmark", "--kv-cache-memory", "64MiB",
        "--max-num-seqs", str(cell.streams),
        environ=environ(cell.tokens_per_second, watch_file),
        module="benchmarks.paced_server",
    ) as server:  # fmt: skip
        asyncio.run(run_streams(server.base_url, Cell(min(8, cell.streams), 8, cell.tokens_per_second)))
        before, started = cpu_seconds(server.process.pid), time.perf_counter()
        answers = asyncio.run(run_streams(server.base_url, cell))
        ended, cpu = time.perf_counter(), cpu_seconds(server.process.pid) - before
    looks = [look for look in read_watch(watch_file) if started < look.when <= ended]
    return summarise(cell, answers, looks, seconds=ended - started, cpu=cpu)


def summarise(
    cell: Cell, answers: Sequence[Answer], looks: Sequence[Look], *, seconds: float, cpu: float
) -> dict[str, Any]:
    """The measures of one cell. cpu: seconds of the API process, more than 0."""
    num_tokens, num_events = sum(a.completion_tokens or 0 for a in answers), sum(a.num_events for a in answers)
    errors = [
        answer.error or f"{answer.completion_tokens} tokens came"
        for answer in answers
        if answer.error is not None or answer.completion_tokens != cell.tokens
    ]
    return {
        "streams": cell.streams,
        "tokens_per_stream": cell.tokens,
        "pace": cell.tokens_per_second or None,
        "at_once": most_at_once(answers),
        "num_errors": len(errors),
        "first_error": errors[0] if errors else None,
        "tokens_per_second": num_tokens / seconds,
        "api_cpu_seconds": cpu,
        "api_cpu_share": cpu / seconds,
        "tokens_per_cpu_second": num_tokens / cpu,
        "events_per_cpu_second": num_events / cpu,
        "tokens_per_event": num_tokens / max(1, num_events),
        "loop_late_ms": lateness(look.late for look in looks),
        "loop_late_cpu_ms": lateness(look.cpu for look in looks),
    }


def rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    heads = ["streams", "pace", "at once", "errors", "tokens/s", "core", "tokens/CPU s", "events/CPU s", "tokens/event"]
    heads += ["late p50", "p99", "max", "CPU p50", "p99", "max"]
    return [
        heads,
        *(
            [
                str(result["streams"]),
                f"{result['pace']:.0f}" if result["pace"] else "none",
                str(result["at_once"]),
                str(result["num_errors"]),
                f"{result['tokens_per_second']:.0f}",
                f"{result['api_cpu_share']:.0%}",
                f"{result['tokens_per_cpu_second']:.0f}",
                f"{result['events_per_cpu_second']:.0f}",
                f"{result['tokens_per_event']:.2f}",
                *(figure_text(value) for value in result["loop_late_ms"].values()),
                *(figure_text(value) for value in result["loop_late_cpu_ms"].values()),
            ]
            for result in results
        ),
    ]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 500], help="at once (default: 64 500)")
    parser.add_argument(
        "--pace", type=float, nargs="+", default=[3000.0, 0.0], help="tokens a second, 0 for none (default: 3000 0)"
    )
    parser.add_argument("--tokens", type=int, default=30_000, help="over all streams of a row (default: 30000)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"the machine is busy (load {load:.1f}): the figures will not be its best", file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), SHAPE)
        results = [
            measure(Path(directory), Cell(streams, max(2, options.tokens // streams), pace))
            for streams in options.streams
            for pace in options.pace
        ]
    settings = {"model": SHAPE, "load_average_before": load}
    print_report(rows(results), {"benchmark": "overhead", **settings, "results": results})
    return 0 if all(result["num_errors"] == 0 for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
