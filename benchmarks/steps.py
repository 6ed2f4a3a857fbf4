"""What answers that repeat cost: tokens a second with `deterministic` and without, without processes and HTTP.

Both are loaded and take turns, and the shortest time of each counts. On the paged tier `on` is the engine's default:
the native decoder where it has the model, else (or with `--kernels torch`) torch with one order of summation in
attention, experts and products; `off` is torch with its own attention and experts and no more rows than tokens. On
the padded tier `on` computes each sequence by itself, and `off` shares forwards.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import print_report
from benchmarks.shapes import SHAPES, write_model
from reprise.engine.core import EngineCore
from reprise.engine.loader import load
from reprise.engine.process import build_core
from reprise.ipc.messages import Add, EngineConfig, Ready, SequenceOutput
from reprise.types import SamplingParams

KV_CACHE_BYTES = 1 << 28


def checked_step(core: EngineCore) -> list[SequenceOutput]:
    """What a step gives. Raises RuntimeError where a sequence ended by an error, which takes no time."""
    outputs = core.step()
    for output in outputs:
        if output.error_code is not None:
            raise RuntimeError(f"sequence {output.sequence_id} ended with {output.error_code}")
    return outputs


def seconds_a_step(core: EngineCore, first_id: int, num_sequences: int, prompt_tokens: int, new_tokens: int) -> float:
    """Mean over the decode steps of so many greedy sequences that run together."""
    sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=new_tokens)
    for index in range(num_sequences):
        core.add(Add(first_id + index, 0, [5 + index] * prompt_tokens, sampling))
    checked_step(core)
    start, num_steps = time.perf_counter(), 0
    while core.has_work:
        checked_step(core)
        num_steps += 1
    return (time.perf_counter() - start) / num_steps


def load_core(directory: str, dtype: str, kernels: str, *, deterministic: bool) -> tuple[EngineCore, Ready]:
    """The engine core, and what was found about its model."""
    settings: dict[str, Any] = {"model": directory, "dtype": dtype, "kernels": kernels, "deterministic": deterministic}
    config = EngineConfig(device="cpu", kv_cache_memory=KV_CACHE_BYTES, **settings)
    loaded = load(config, lambda _stage, _share: None)
    if loaded.ready.deterministic is not deterministic:
        raise RuntimeError(f"{directory} in {dtype}: {loaded.ready.deterministic_reason}")
    return build_core(loaded, None), loaded.ready


def measure(directory: str, dtype: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """For each number of sequences: seconds of a decode step with `deterministic` on and off."""
    cores = {}
    cores["off"], _ = load_core(directory, dtype, "torch", deterministic=False)
    cores["on"], ready = load_core(directory, dtype, arguments.kernels, deterministic=True)
    results = []
    first_id = 1
    for count in arguments.sequences:
        best = dict.fromkeys(cores, float("inf"))
        for _ in range(arguments.repeats):
            for mode, core in cores.items():
                seconds = seconds_a_step(core, first_id, count, arguments.prompt_tokens, arguments.new_tokens)
                best[mode] = min(best[mode], seconds)
                first_id += count
        results.append({
            "tier": ready.tier, "kernels": ready.kernels, "dtype": dtype, "sequences": count,
            "on_ms": best["on"] * 1000, "off_ms": best["off"] * 1000,
            "on_tokens_per_second": count / best["on"], "off_tokens_per_second": count / best["off"],
        })  # fmt: skip
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=["pocket", "smollm2-135m", "falcon-50m"],
        help=f"model directories, pocket, or shapes that are made with random weights: {', '.join(SHAPES)}",
    )
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--kernels", choices=("auto", "torch"), default="auto", help="of `on` (default: auto)")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (default: its own choice)")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    table = [
        ["model", "tier", "kernels", "dtype", "sequences", "on tokens/s", "off tokens/s", "on / off", "on ms", "off ms"]
    ]
    results: list[dict[str, Any]] = []
    for model in arguments.model:
        for dtype in arguments.dtype:
            with tempfile.TemporaryDirectory() as made:
                directory = str(resources.files("reprise") / "pocket") if model == "pocket" else model
                if model in SHAPES:
                    write_model(Path(made), model, dtype=dtype)
                    directory = made
                for result in measure(directory, dtype, arguments):
                    results.append({"model": model, **result})
                    on, off = result["on_tokens_per_second"], result["off_tokens_per_second"]
                    table.append([
                        model, result["tier"], result["kernels"], dtype, str(result["sequences"]),
                        f"{on:.0f}", f"{off:.0f}", f"{on / off:.2f}",
                        f"{result['on_ms']:.2f}", f"{result['off_ms']:.2f}",
                    ])  # fmt: skip
    print_report(table, {"benchmark": "steps", "threads": torch.get_num_threads(), "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
