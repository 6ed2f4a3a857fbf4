"""Start `reprise serve` several times and measure what a start takes: time, and memory.

Seconds from the start of the process to the first answer of /health, to /ready, and to the first token of a streamed
completion that is sent then; the peak resident memory of the API process and of the engine process, once the idle
engine has taken that of its KV cache, which should stay below 1.25 x (weights + KV cache) + 700 MB. The first start
does not count: it compiles Python and fills the page cache.
Memory is read on Linux alone. Models of the shapes have random weights, and are made where they are missing.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import peer_builds
from benchmarks.local_server import start_server
from benchmarks.processes import busy_seconds, kilobytes, parents
from benchmarks.report import print_report
from benchmarks.streaming import stream_completion

SHAPES = ("smollm2-135m", "qwen3-0.6b")
MEMORY_FACTOR = 1.25
MEMORY_CONSTANT = 700_000_000
MB = 1e6
POLL_SECONDS = 0.01
STEADY_SECONDS = 2.0


def measure(model: Path, *flags: str, timeout: float = 300.0) -> dict[str, Any]:
    """One start: seconds, and bytes of memory at its end."""
    busy = busy_seconds()
    # Compiled Python is kept, whatever this process does: nobody starts without.
    environ = {"PYTHONDONTWRITEBYTECODE": ""}
    begin = time.perf_counter()
    server = start_server(str(model), "--served-model-name", "benchmark", *flags, environ=environ)
    try:
        server.wait_for("/health", timeout, interval=POLL_SECONDS)
        listening = time.perf_counter() - begin
        server.wait_for("/ready", timeout, interval=POLL_SECONDS)
        ready = time.perf_counter() - begin
        body = {"model": "benchmark", "prompt": list(range(1, 17)), "max_tokens": 1, "stream": True}
        times = asyncio.run(stream_completion(server.base_url, body | {"ignore_eos": True}, limit=timeout))
        if not times.arrivals:
            raise RuntimeError(f"no token came: {times.error}\n{server.log}")
        first = times.arrivals[0] - begin
        cores = (busy_seconds() - busy) / (time.perf_counter() - begin)
        return {
            "listening_seconds": listening,
            "ready_seconds": ready,
            "first_token_seconds": first,
            "busy_cores": cores,
            **steady_memory(server.process.pid),
        }
    finally:
        server.stop()
        server.log_path.unlink()


def steady_memory(api_pid: int) -> dict[str, int]:
    """As `memory` has it, once it has not grown for STEADY_SECONDS."""
    found, since = memory(api_pid), time.perf_counter()
    while time.perf_counter() - since < STEADY_SECONDS:
        time.sleep(0.2)
        before, found = found, memory(api_pid)
        if found["engine_bytes"] > before["engine_bytes"]:
            since = time.perf_counter()
    return found


def memory(api_pid: int) -> dict[str, int]:
    """Bytes: the largest resident size that each of both processes had, and what all processes have now."""
    parent_of = parents()
    tree = {api_pid}
    while more := {pid for pid, parent in parent_of.items() if parent in tree} - tree:
        tree |= more
    # The engine is a child of the fork server, which is a child of the API process.
    engines = [pid for pid in tree if parent_of.get(parent_of.get(pid, 0)) == api_pid]
    api, engine = kilobytes(api_pid, "status", "VmHWM"), sum(kilobytes(pid, "status", "VmHWM") for pid in engines)
    share = sum(kilobytes(pid, "smaps_rollup", "Pss") for pid in tree)
    return {"api_bytes": api * 1024, "engine_bytes": engine * 1024, "share_bytes": share * 1024}


def summarise(shape: str, model: Path, kv_cache_memory: int, starts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of times, maxima of memory."""
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    limit = int(MEMORY_FACTOR * (weights + kv_cache_memory) + MEMORY_CONSTANT)
    seconds = ("listening_seconds", "ready_seconds", "first_token_seconds", "busy_cores")
    sizes = ("api_bytes", "engine_bytes", "share_bytes")
    both = max(start["api_bytes"] + start["engine_bytes"] for start in starts)
    return {
        "shape": shape,
        **{name: statistics.median(start[name] for start in starts) for name in seconds},
        **{name: max(start[name] for start in starts) for name in sizes},
        "weights_bytes": weights,
        "kv_cache_bytes": kv_cache_memory,
        "both_bytes": both,
        "limit_bytes": limit,
        "within_limit": both <= limit,
        "starts": list(starts),
    }


def rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    heads = ["shape", "starts", "listening", "ready", "first token", "busy cores"]
    heads += ["API", "engine", "both at most", "limit", "all, shared once"]
    table = [heads]
    for result in results:
        sizes = ("api_bytes", "engine_bytes", "both_bytes", "limit_bytes", "share_bytes")
        times = ("listening_seconds", "ready_seconds", "first_token_seconds")
        table.append(
            [
                result["shape"],
                str(len(result["starts"])),
                *(f"{result[name]:.2f} s" for name in times),
                f"{result['busy_cores']:.1f}",
                *(f"{result[name] / MB:.0f} MB" for name in sizes),
            ]
        )
    return table


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(SHAPES), help=f"shapes (default: {' '.join(SHAPES)})")
    parser.add_argument("--starts", type=int, default=5, help="starts that count, of each (default: 5)")
    parser.add_argument("--kv-cache-memory", type=int, default=1 << 30, help="bytes (default: 1 GiB)")
    parser.add_argument("--peers", type=Path, default=Path("~/.cache/reprise-peers"), help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    results = []
    for shape in options.model:
        model = peer_builds.model_directory(options.peers.expanduser(), shape)
        size = options.kv_cache_memory
        starts = [measure(model, "--kv-cache-memory", str(size)) for _ in range(options.starts + 1)]
        results.append(summarise(shape, model, size, starts[1:]))
    print_report(rows(results), {"benchmark": "startup", "results": results})
    return 0 if all(result["within_limit"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
