"""What the KV cache is worth: the same request with `use_cache` on and off, alone on the server.

Off means that every step computes all tokens anew; the answers must be the same. For a model on a GPU, 100
new tokens were published as 4.65 s with the cache and 30.6 s without. Without --url a server is started for
each model in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.local_server import running_server
from benchmarks.report import print_report
from benchmarks.shapes import SHAPES, write_model

SHAPES_DIRECTORY = Path("runs/shapes")


def generate(url: str, model: str, *, use_cache: bool, prompt_tokens: int, new_tokens: int) -> tuple[float, list[int]]:
    """Seconds for one request, and the ids that it generated."""
    body = {
        "model": model,
        "prompt": [1 + number % 255 for number in range(prompt_tokens)],
        "max_tokens": new_tokens,
        "min_tokens": new_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "use_cache": use_cache,
        "return_token_ids": True,
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)  # noqa: S310 # the server under test
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=3600) as response:  # noqa: S310 # as above
        answer = json.load(response)
    return time.perf_counter() - start, answer["choices"][0]["token_ids"]


def measure(url: str, model: str, *, prompt_tokens: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` requests of either kind, in turn, after one of each that does not count."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    answers: list[list[int]] = []
    for repeat in range(repeats + 1):
        for use_cache in (True, False):
            duration, token_ids = generate(
                url, model, use_cache=use_cache, prompt_tokens=prompt_tokens, new_tokens=new_tokens
            )
            answers.append(token_ids)
            if repeat > 0:
                seconds[use_cache].append(duration)
    with_cache, without_cache = statistics.median(seconds[True]), statistics.median(seconds[False])
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "with_cache_seconds": with_cache,
        "without_cache_seconds": without_cache,
        "ratio": without_cache / with_cache,
        "same_tokens": all(answer == answers[0] and len(answer) == new_tokens for answer in answers),
    }


def model_directory(model: str) -> str:
    """Where a model is; one that is the name of a shape is made first."""
    if model not in SHAPES:
        return model
    directory = SHAPES_DIRECTORY / model
    if not (directory / "model.safetensors").exists():
        write_model(directory, model)
    return str(directory)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="server to ask instead of starting one; --model is then a name it serves")
    parser.add_argument(
        "--model",
        nargs="+",
        default=["pocket"],
        help=f"models to serve, or shapes to make with random weights: {', '.join(SHAPES)} (default: pocket)",
    )
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    sizes = {name: getattr(options, name) for name in ("prompt_tokens", "new_tokens", "repeats")}
    results = []
    for model in options.model:
        if options.url is not None:
            results.append({"model": model} | measure(options.url, model, **sizes))
            continue
        with running_server(model_directory(model), "--served-model-name", "benchmark") as server:
            results.append({"model": model} | measure(server.base_url, "benchmark", **sizes))
    heads = ["model", "new tokens", "with cache", "without", "ratio", "same tokens"]
    lines = [
        [
            result["model"],
            str(result["new_tokens"]),
            f"{result['with_cache_seconds']:.3f} s",
            f"{result['without_cache_seconds']:.3f} s",
            f"{result['ratio']:.2f}",
            "yes" if result["same_tokens"] else "NO",
        ]
        for result in results
    ]
    print_report([heads, *lines], {"benchmark": "use_cache", "results": results})
    return 0 if all(result["same_tokens"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
