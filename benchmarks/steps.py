"""What one decode step of the engine takes, without processes and HTTP, and what repeatable attention costs in it.

`fixed` is the engine's attention, with one order of summation for every token; `torch` puts torch's scaled dot-product
attention in its place, whose order follows its shapes. The two alternate, and the shortest time of each counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import print_report
from reprise.engine import attention
from reprise.engine.loader import load
from reprise.engine.process import build_core
from reprise.ipc.messages import Add, EngineConfig
from reprise.types import SamplingParams

FIXED = attention.attend


def by_torch(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *, scale: float, **_: Any) -> Tensor:
    """The same attention by torch; for models without soft caps and sinks."""
    grouped = (-1, query.shape[1], -1, -1)
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, keys[:, None].expand(grouped), values[:, None].expand(grouped), attn_mask=visible, scale=scale
    )
    return attended.float()


def seconds_a_step(core: Any, first_id: int, num_sequences: int, prompt_tokens: int, new_tokens: int) -> float:
    """Mean over the decode steps of so many greedy sequences that run together."""
    sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=new_tokens)
    for index in range(num_sequences):
        core.add(Add(first_id + index, 0, [5 + index] * prompt_tokens, sampling))
    core.step()
    start, num_steps = time.perf_counter(), 0
    while core.has_work:
        core.step()
        num_steps += 1
    return (time.perf_counter() - start) / num_steps


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(resources.files("reprise") / "pocket"), help="a model directory")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (default: its own choice)")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    table = [["dtype", "sequences", "fixed ms", "torch ms", "fixed / torch"]]
    results: list[dict[str, Any]] = []
    for dtype in arguments.dtype:
        loaded = load(EngineConfig(model=arguments.model, dtype=dtype, device="cpu"), lambda _stage, _share: None)
        core, first_id = build_core(loaded, None), 1
        for count in arguments.sequences:
            best = {"fixed": float("inf"), "torch": float("inf")}
            for _ in range(arguments.repeats):
                for name, function in (("fixed", FIXED), ("torch", by_torch)):
                    attention.attend = function
                    seconds = seconds_a_step(core, first_id, count, arguments.prompt_tokens, arguments.new_tokens)
                    best[name] = min(best[name], seconds)
                    first_id += count
            attention.attend = FIXED
            fixed, other = best["fixed"] * 1000, best["torch"] * 1000
            table.append([dtype, str(count), f"{fixed:.2f}", f"{other:.2f}", f"{fixed / other:.2f}"])
            results.append({"dtype": dtype, "sequences": count, "fixed_ms": fixed, "torch_ms": other})
    print_report(table, {"benchmark": "steps", "threads": torch.get_num_threads(), "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
