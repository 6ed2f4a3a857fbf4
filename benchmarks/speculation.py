"""What guesses ahead give: tokens a second with and without, and how many of them were kept. No processes, no HTTP.

Each way answers the same prompts by itself, one sequence at a time, and they take turns; the shortest time of each
counts. Answers are compared with `==`.

  none         no guesses
  ngram        from what the text said before
  predicted    the request predicts the whole answer: the best that there can be
  mistaken     it predicts something else, which should cost little
  draft        a draft model, which is the model itself: always right, and too slow to pay

Then a model whose later layers add little, with a draft model that is its first layers, for each of --pairs: what the
later layers' outputs are multiplied by. 0 is a draft model that is always right; larger numbers are less often. Their
answers are sampled, at temperature 0.2: greedy ones of random weights soon repeat themselves.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import print_report
from benchmarks.shapes import SHAPES, write_model, write_pair
from benchmarks.steps import checked_step
from reprise.engine.core import EngineCore
from reprise.engine.loader import load
from reprise.engine.process import build_core
from reprise.ipc.messages import Add, EngineConfig
from reprise.types import SamplingParams

KV_CACHE_BYTES = 1 << 28
SPECULATE = {"none": "none", "ngram": "ngram", "predicted": "none", "mistaken": "none", "draft": "draft"}
"""Ways, and the setting `speculate` of each."""
FIRST_ID = 20
PAIR_SHAPES = [name for name, sizes in SHAPES.items() if sizes["model_type"] in ("llama", "qwen3")]
"""Whose layers `write_pair` knows."""


class Way:
    """A model with guesses of one origin."""

    def __init__(self, directory: str, dtype: str, speculate: str, draft_model: str) -> None:
        draft = {"draft_model": draft_model} if speculate == "draft" else {}
        settings: dict[str, Any] = {"model": directory, "dtype": dtype, "speculate": speculate, **draft}
        config = EngineConfig(device="cpu", kv_cache_memory=KV_CACHE_BYTES, deterministic=True, **settings)
        self._core: EngineCore = build_core(load(config, lambda _stage, _share: None), None)
        self._next_id = 1

    def answer(
        self, prompt: list[int], new_tokens: int, prediction: list[int], temperature: float
    ) -> tuple[list[int], float]:
        """Token ids, and the seconds that they took."""
        sampling = SamplingParams(seed=0, temperature=temperature, max_tokens=new_tokens)
        self._core.add(Add(self._next_id, 0, prompt, sampling, prediction_token_ids=prediction))
        self._next_id += 1
        token_ids: list[int] = []
        start = time.perf_counter()
        while self._core.has_work:
            for output in checked_step(self._core):
                token_ids += output.token_ids
        return token_ids, time.perf_counter() - start

    def guesses(self) -> tuple[int, int]:
        """How many there were, and how many were kept."""
        stats = self._core.stats()
        return stats.num_draft_tokens, stats.num_kept_draft_tokens


def prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(FIRST_ID, min(vocab_size, 1000), (length,), generator=generator).tolist() for _ in range(count)
    ]


def measure(
    ways: dict[str, Way], vocab_size: int, options: argparse.Namespace, temperature: float = 0.0
) -> list[dict[str, Any]]:
    """Of ways to run one model, `none` among them. Raises RuntimeError where guesses change an answer."""
    best = dict.fromkeys(ways, float("inf"))
    asked = prompts(options.prompts, options.prompt_tokens, vocab_size)
    answers = [ways["none"].answer(prompt, options.new_tokens, [], temperature)[0] for prompt in asked]
    for _ in range(options.repeats):
        for name, way in ways.items():
            seconds = 0.0
            for prompt, expected in zip(asked, answers, strict=True):
                prediction = {"predicted": expected, "mistaken": expected[::-1]}.get(name, [])
                token_ids, taken = way.answer(prompt, options.new_tokens, prediction, temperature)
                if token_ids != expected:
                    raise RuntimeError(f"{name}: guesses have changed an answer")
                seconds += taken
            best[name] = min(best[name], seconds)
    num_tokens = sum(map(len, answers))
    results = []
    for name, way in ways.items():
        num_guesses, num_kept = way.guesses()
        results.append({
            "way": name, "tokens_per_second": num_tokens / best[name], "ratio": best["none"] / best[name],
            "num_guesses": num_guesses, "kept_share": num_kept / num_guesses if num_guesses else None,
        })  # fmt: skip
    return results


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=("pocket", *SHAPES), nargs="+", default=["pocket", "smollm2-135m"])
    parser.add_argument(
        "--pairs", type=float, nargs="*", default=[0.0, 0.01, 0.02, 0.05], help="(default: 0 0.01 0.02 0.05)"
    )
    parser.add_argument("--pair-shape", choices=PAIR_SHAPES, default="smollm2-135m", help="(default: smollm2-135m)")
    parser.add_argument("--draft-layers", type=int, default=4, help="of a pair's draft model (default: 4)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=3, help="(default: 3)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="(default: 64)")
    parser.add_argument("--new-tokens", type=int, default=96, help="(default: 96)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: 3)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    rows = [["model", "guesses", "tokens/s", "against none", "guessed", "kept"]]
    by_model: dict[str, list[dict[str, Any]]] = {}
    for model in options.model:
        with ExitStack() as stack:
            if model == "pocket":
                directory, vocab_size = str(resources.files("reprise") / "pocket"), 1000
            else:
                directory, vocab_size = stack.enter_context(tempfile.TemporaryDirectory()), SHAPES[model]["vocab_size"]
                write_model(Path(directory), model, dtype=options.dtype)
            ways = {name: Way(directory, options.dtype, how, directory) for name, how in SPECULATE.items()}
            by_model[model] = measure(ways, vocab_size, options)
    for later in options.pairs:
        shape = options.pair_shape
        with tempfile.TemporaryDirectory() as directory:
            whole, draft = Path(directory, "model"), Path(directory, "draft")
            sizes = {"num_draft_layers": options.draft_layers, "dtype": options.dtype}
            write_pair(whole, draft, shape, later=later, **sizes)
            ways = {name: Way(str(whole), options.dtype, name, str(draft)) for name in ("none", "draft")}
            by_model[f"{shape}, later × {later:g}"] = measure(ways, SHAPES[shape]["vocab_size"], options, 0.2)
    for model, results in by_model.items():
        for result in results:
            kept = "-" if result["kept_share"] is None else f"{result['kept_share']:.0%}"
            rows.append([
                model, result["way"], f"{result['tokens_per_second']:.0f}", f"{result['ratio']:.2f}",
                str(result["num_guesses"]), kept,
            ])  # fmt: skip
    print_report(rows, {"benchmark": "speculation", "threads": torch.get_num_threads(), "models": by_model})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
