"""Load an OpenAI-compatible server with streamed completions and measure what its clients feel.

Every request has the same number of random prompt tokens and generates the same number of tokens; a given
number of clients send one after the other. For each concurrency: time to the first token (TTFT), time between
two pieces of an answer (ITL; a piece is a token, or several where the model is faster than the stream), tokens
a second over all clients, and whether every token that was asked for came, by the server's usage and by counting
the ids.
Times are in milliseconds. Without --url a server is started for the run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.local_server import running_server
from benchmarks.report import figure_text, percentiles, print_report
from benchmarks.streaming import StreamTimes, stream_completion

SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Load:
    """What is asked of the server. `extensions`: use fields that OpenAI's protocol does not have."""

    url: str
    model: str
    prompt_tokens: int
    output_tokens: int
    shared_prefix_tokens: int = 0
    max_token_id: int = 255
    temperature: float = 0.0
    seed: int = 0
    extensions: bool = True
    api_key: str | None = None
    timeout: float = 600.0

    def body(self, number: int) -> dict[str, Any]:
        """The request of this number: the same one in every run with the same seed."""
        shared = random.Random(self.seed)
        own = random.Random(f"{self.seed}/{number}")
        num_own = self.prompt_tokens - self.shared_prefix_tokens
        prompt = [shared.randrange(1, self.max_token_id + 1) for _ in range(self.shared_prefix_tokens)]
        prompt += [own.randrange(1, self.max_token_id + 1) for _ in range(num_own)]
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.output_tokens,
            "temperature": self.temperature,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.extensions:
            body |= {"ignore_eos": True, "min_tokens": self.output_tokens, "return_token_ids": True}
        return body


async def run_load(load: Load, *, concurrency: int, num_requests: int, first_number: int) -> dict[str, Any]:
    """Send `num_requests` requests with `concurrency` clients and sum up."""
    numbers = iter(range(first_number, first_number + num_requests))
    finished: list[StreamTimes] = []

    async def client() -> None:
        for number in numbers:
            times = await stream_completion(load.url, load.body(number), api_key=load.api_key, limit=load.timeout)
            finished.append(times)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return summarise(load, finished, concurrency=concurrency, seconds=time.perf_counter() - start)


def summarise(load: Load, requests: Sequence[StreamTimes], *, concurrency: int, seconds: float) -> dict[str, Any]:
    """The measures of one concurrency; times in milliseconds."""
    good = [request for request in requests if request.error is None]
    num_tokens = sum(request.usage_tokens or 0 for request in good)
    first = [(request.arrivals[0] - request.start) * 1e3 for request in good if request.arrivals]
    gaps = [
        (later - earlier) * 1e3
        for request in good
        for earlier, later in zip(request.arrivals, request.arrivals[1:], strict=False)
    ]
    by_usage = sum(request.usage_tokens == load.output_tokens for request in good)
    counted = [request.num_counted_tokens for request in good if request.num_counted_tokens is not None]
    errors = [request.error for request in requests if request.error is not None]
    return {
        "concurrency": concurrency,
        "num_requests": len(requests),
        "num_errors": len(errors),
        "first_error": errors[0] if errors else None,
        "seconds": seconds,
        "output_tokens_per_second": num_tokens / seconds,
        "requests_per_second": len(good) / seconds,
        "ttft_ms": percentiles(first, SHARES),
        "itl_ms": percentiles(gaps, SHARES),
        "num_complete_by_usage": by_usage,
        "num_complete_by_count": sum(n == load.output_tokens for n in counted) if counted else None,
        "complete": not errors and by_usage == len(good) and all(count == load.output_tokens for count in counted),
    }


def rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    heads = ["clients", "requests", "errors", "tokens/s", *(f"TTFT p{share * 100:g}" for share in SHARES)]
    heads += [*(f"ITL p{share * 100:g}" for share in SHARES), "tokens complete"]
    return [
        heads,
        *(
            [
                str(result["concurrency"]),
                str(result["num_requests"]),
                str(result["num_errors"]),
                f"{result['output_tokens_per_second']:.1f}",
                *(figure_text(value) for value in result["ttft_ms"].values()),
                *(figure_text(value, 2) for value in result["itl_ms"].values()),
                "yes" if result["complete"] else "NO",
            ]
            for result in results
        ),
    ]


async def run_all(load: Load, concurrencies: Sequence[int], num_requests: int | None) -> list[dict[str, Any]]:
    await run_load(load, concurrency=1, num_requests=2, first_number=-2)  # warm up
    results = []
    first_number = 0
    for concurrency in concurrencies:
        count = num_requests or max(4, 3 * concurrency)
        results.append(await run_load(load, concurrency=concurrency, num_requests=count, first_number=first_number))
        first_number += count
    return results


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="server to load; without it, `reprise serve MODEL` is started")
    parser.add_argument("--model", default="pocket", help="name that requests use, or what is served (default: pocket)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="clients (default: 1 4 16)")
    parser.add_argument("--requests", type=int, help="requests at each concurrency (default: 3 a client)")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--shared-prefix-tokens", type=int, default=0, help="prompt tokens that all requests share")
    parser.add_argument("--max-token-id", type=int, default=255, help="prompts use ids 1 to this (default: 255)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one request")
    parser.add_argument(
        "--no-extensions",
        action="store_true",
        help="send no field outside of OpenAI's protocol; outputs may be shorter",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    with ExitStack() as stack:
        url, model = options.url, options.model
        if url is None:
            server = stack.enter_context(running_server(model, "--served-model-name", "benchmark"))
            url, model = server.base_url, "benchmark"
        load = Load(
            url=url,
            model=model,
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            shared_prefix_tokens=min(options.shared_prefix_tokens, options.prompt_tokens),
            max_token_id=options.max_token_id,
            temperature=options.temperature,
            seed=options.seed,
            extensions=not options.no_extensions,
            api_key=os.environ.get("API_KEY"),
            timeout=options.timeout,
        )
        results = asyncio.run(run_all(load, options.concurrency, options.requests))
    settings = {
        name: getattr(load, name) for name in ("model", "prompt_tokens", "output_tokens", "shared_prefix_tokens")
    }
    print_report(rows(results), {"benchmark": "load", **settings, "results": results})
    return 0 if all(result["num_errors"] == 0 for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
