"""How the engine's time for a step grows: with the batch, with the context, and with how many sequences wait.

The engine core without processes and HTTP, and a model of near-zero cost, so that what is around the model shows. Each
row: the median over decode steps of the whole step (scheduling, forward, sampling, applying) and of its scheduling
alone, which may not grow with the number that wait. What they wait for:

- places: as many run as may;
- blocks: the KV cache has no room for the next one, which is looked at anew in each step;
- turn: one of those that run ends in each step, and the next one is let in.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.report import print_report
from benchmarks.shapes import SHAPES, write_model
from benchmarks.steps import checked_step
from reprise.engine.block_pool import BlockPool
from reprise.engine.core import EngineCore
from reprise.engine.loader import LoadedModel, load
from reprise.engine.sampler import Sampler
from reprise.engine.scheduler import Batch, Scheduler
from reprise.ipc.messages import Add, EngineConfig
from reprise.types import SamplingParams

SHAPE = "tiny"
KV_CACHE_BYTES = 1 << 26
CONTEXT = 32
"""Tokens of a prompt, where the row is not about them."""
BATCH = 8
"""Sequences that run, where the row is not about them."""
WARM_UP_STEPS = 3


class TimedScheduler(Scheduler):
    """Notes how many seconds each call of `schedule` took."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.taken: list[float] = []

    def schedule(self) -> Batch:
        began = time.perf_counter()
        batch = super().schedule()
        self.taken.append(time.perf_counter() - began)
        return batch


class Cell:
    """An engine core of its own over the model."""

    def __init__(self, loaded: LoadedModel, *, places: int, num_blocks: int | None = None) -> None:
        pool = BlockPool(num_blocks or loaded.num_blocks, loaded.block_size)
        self._scheduler = TimedScheduler(replace(loaded.limits, max_num_seqs=places), pool)
        self._core = EngineCore(self._scheduler, loaded.runner, Sampler(None, loaded.selection))
        self._next_id = 0

    def add(self, context: int, new_tokens: Iterable[int]) -> None:
        """A sequence for each number of new tokens. No two prompts have a block in common."""
        limit = SHAPES[SHAPE]["vocab_size"]
        for max_tokens in new_tokens:
            self._next_id += 1
            prompt = [*divmod(self._next_id, limit), *[5] * (context - 2)]
            sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=max_tokens)
            self._core.add(Add(self._next_id, 0, prompt, sampling))

    def fill(self, num_running: int) -> None:
        """Step until so many have their first token."""
        begun: set[int] = set()
        while len(begun) < num_running:
            begun.update(output.sequence_id for output in checked_step(self._core))

    def measure(self, num_steps: int) -> dict[str, float]:
        """Medians over the steps, and how many run and wait at their end."""
        steps = []
        for _ in range(WARM_UP_STEPS + num_steps):
            began = time.perf_counter()
            checked_step(self._core)
            steps.append(time.perf_counter() - began)
        return {
            "running": self._scheduler.num_running,
            "waiting": self._scheduler.num_waiting,
            "step_ms": statistics.median(steps[-num_steps:]) * 1e3,
            "scheduling_us": statistics.median(self._scheduler.taken[-num_steps:]) * 1e6,
        }


def decoding(loaded: LoadedModel, batch: int, context: int, num_steps: int) -> dict[str, float]:
    """So many run, with so many tokens each, and nobody waits."""
    cell = Cell(loaded, places=batch)
    cell.add(context, [num_steps + WARM_UP_STEPS + batch + 2] * batch)
    cell.fill(batch)
    return cell.measure(num_steps)


def waiting(loaded: LoadedModel, why: str, count: int, num_steps: int) -> dict[str, float]:
    new_tokens, places, num_blocks, their_context = num_steps + WARM_UP_STEPS + 2, BATCH, None, CONTEXT
    if why == "blocks":
        places = 2 * BATCH
        at_first, at_last = (-(-tokens // loaded.block_size) for tokens in (CONTEXT, CONTEXT + new_tokens))
        num_blocks = BATCH * at_last
        their_context = min(BATCH * (at_last - at_first) + 1, num_blocks - at_last) * loaded.block_size
    cell = Cell(loaded, places=places, num_blocks=num_blocks)
    if why == "turn":
        cell.add(CONTEXT, range(2, BATCH + 2))
        cell.add(CONTEXT, [BATCH] * (count + num_steps + WARM_UP_STEPS + 1))
    else:
        cell.add(CONTEXT, [new_tokens] * BATCH)
        cell.add(their_context, [new_tokens] * count)
    cell.fill(BATCH)
    return cell.measure(num_steps)


def measure(loaded: LoadedModel, options: argparse.Namespace) -> list[dict[str, Any]]:
    steps = options.steps
    return [
        *({"of": "batch", "context": CONTEXT, **decoding(loaded, batch, CONTEXT, steps)} for batch in options.batch),
        *(
            {"of": "context", "context": context, **decoding(loaded, BATCH, context, steps)}
            for context in options.context
        ),
        *(
            {"of": f"waiting for {why}", "context": CONTEXT, **waiting(loaded, why, count, steps)}
            for why in ("places", "blocks", "turn")
            for count in options.waiting
        ),
    ]


def rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        ["grows", "running", "context", "waiting", "step ms", "scheduling us"],
        *(
            [
                result["of"], str(result["running"]), str(result["context"]), str(result["waiting"]),
                f"{result['step_ms']:.2f}", f"{result['scheduling_us']:.0f}",
            ]
            for result in results
        ),
    ]  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="sequences that run")
    parser.add_argument("--context", type=int, nargs="+", default=[32, 128, 512, 1024, 1920], help="tokens of each")
    parser.add_argument("--waiting", type=int, nargs="+", default=[10, 100, 1000, 10_000], help="sequences that wait")
    parser.add_argument("--steps", type=int, default=60, help="decode steps of each row (default: 60)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the model (default: 1)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), SHAPE)
        config = EngineConfig(
            model=directory,
            device="cpu",
            kv_cache_memory=KV_CACHE_BYTES,
            max_num_seqs=max(options.batch),
            num_threads=options.threads,
        )
        loaded = load(config, lambda _stage, _share: None)
        results = measure(loaded, options)
    settings = {"model": SHAPE, "kernels": loaded.ready.kernels, "threads": options.threads}
    print_report(rows(results), {"benchmark": "scaling", **settings, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
