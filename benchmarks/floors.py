"""What this machine can do at best: how fast it reads memory and multiplies matrices, measured with torch.

A decode step reads every weight once, a prefill multiplies with every weight once for each token: bytes of
the weights over the first rate, and operations over the second, are times that no server here goes below.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.report import print_report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def best_seconds(operation: Callable[[], object], *, budget: float, device: str) -> float:
    """The shortest of as many runs as fit into `budget` seconds, at least three, after one to warm up."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    operation()
    wait()
    best, spent, num_runs = float("inf"), 0.0, 0
    while spent < budget or num_runs < 3:
        start = time.perf_counter()
        operation()
        wait()
        seconds = time.perf_counter() - start
        best, spent, num_runs = min(best, seconds), spent + seconds, num_runs + 1
    return best


def read_bandwidth(num_bytes: int, *, budget: float, device: str) -> float:
    """Bytes a second of a sum over a buffer, which should be far larger than the caches."""
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return buffer.nbytes / best_seconds(buffer.sum, budget=budget, device=device)


def matrix_rate(rows: int, size: int, dtype: torch.dtype, *, budget: float, device: str) -> float:
    """Floating-point operations a second of (rows, size) times a weight of (size, size), as a linear layer has it.

    Of fewer rows where so many would take longer than the budget, as in bfloat16 on a CPU without such instructions.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, size, generator=generator).to(device, dtype)
    weight = torch.randn(size, size, generator=generator).to(device, dtype)
    for count in sorted({min(rows, 16), rows}):
        part = left[:count]
        seconds = best_seconds(lambda part=part: linear(part, weight), budget=budget, device=device)  # type: ignore[misc]
        if seconds * rows / count > budget:
            break
    return 2 * count * size * size / seconds


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the buffer that is read (default: 1024)")
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the matrices (default: 2048)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement (default: 2)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    measured: dict[str, Any] = {"budget": options.seconds, "device": device}
    bandwidth = read_bandwidth(options.megabytes * 10**6, **measured)
    rates = {
        name: {
            "many_rows": matrix_rate(options.size, options.size, dtype, **measured),
            "one_row": matrix_rate(1, options.size, dtype, **measured),
        }
        for name, dtype in DTYPES.items()
    }
    lines = [["floor", "rate"], ["memory read", f"{bandwidth / 1e9:.1f} GB/s"]]
    for name, rate in rates.items():
        lines.append([f"{name} matrix times matrix", f"{rate['many_rows'] / 1e9:.1f} GFLOP/s"])
        lines.append([f"{name} vector times matrix", f"{rate['one_row'] / 1e9:.1f} GFLOP/s"])
    result = {
        "benchmark": "floors",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "read_bytes_per_second": bandwidth,
        "operations_per_second": rates,
    }
    print_report(lines, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
