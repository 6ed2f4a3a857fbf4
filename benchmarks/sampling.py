"""What it takes to choose the tokens of a step: milliseconds natively and with torch, in turns. No model.

Scores are normal with a standard deviation of 3, so that a few tokens are likely, as with trained models. The shortest
time of each counts. `agree` is the share of rows for which both choose the same token: at the border of top_p they
round differently.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence as Ordered
from typing import Any

import torch

from benchmarks.report import print_report
from reprise.engine.native.library import NativeContext, built_variants
from reprise.engine.native.selection import NativeSelection
from reprise.engine.sampler import Sampler
from reprise.engine.sequence import Sequence
from reprise.types import SamplingParams

SPREAD = 3.0
LEAST_AGREEMENT = 0.9
PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "0.7, top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "0.6, top_k 20, top_p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
}


def measure(vocab_size: int, num_rows: int, parameters: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Raises RuntimeError where both choose different tokens more often than rounding explains."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * SPREAD
    sequences = [
        Sequence(i, choice_index=0, prompt_token_ids=[1], sampling=SamplingParams(seed=i, max_tokens=9, **parameters))
        for i in range(num_rows)
    ]
    context = NativeContext(torch.get_num_threads())
    samplers = {"native": Sampler(None, NativeSelection(context)), "torch": Sampler()}
    chosen: dict[str, list[int | None]] = {}
    best = dict.fromkeys(samplers, float("inf"))
    for _ in range(repeats + 1):
        for name, sampler in samplers.items():
            start = time.perf_counter()
            sampled = sampler.sample(sequences, logits)
            best[name] = min(best[name], time.perf_counter() - start)
            chosen[name] = [one.token_id for one in sampled]
    pairs = zip(chosen["native"], chosen["torch"], strict=True)
    agreement = sum(native == torchs for native, torchs in pairs) / num_rows
    if agreement < LEAST_AGREEMENT:
        raise RuntimeError(f"{parameters}: both choose the same token for {agreement:.0%} of the rows")
    return {
        "vocab_size": vocab_size, "rows": num_rows, "agreement": agreement,
        "native_ms": best["native"] * 1000, "torch_ms": best["torch"] * 1000,
    }  # fmt: skip


def main(arguments: Ordered[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[49_152, 151_936], help="default: %(default)s")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64], help="sequences in a step (default: 1 64)")
    parser.add_argument("--repeats", type=int, default=10, help="default: 10")
    options = parser.parse_args(arguments)
    if not built_variants():
        print("the native library was not built for this CPU: there is nothing to compare with")
        return 0
    table = [["vocabulary", "rows", "parameters", "native ms", "torch ms", "torch / native", "agree"]]
    results = []
    for vocab_size in options.vocab:
        for num_rows in options.rows:
            for name, parameters in PARAMETERS.items():
                result = measure(vocab_size, num_rows, parameters, options.repeats)
                results.append({"parameters": name, **result})
                native, torchs = result["native_ms"], result["torch_ms"]
                table.append([
                    f"{vocab_size:,}", str(num_rows), name, f"{native:.2f}", f"{torchs:.2f}", f"{torchs / native:.1f}",
                    f"{result['agreement']:.0%}",
                ])  # fmt: skip
    print_report(table, {"benchmark": "sampling", "threads": torch.get_num_threads(), "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
