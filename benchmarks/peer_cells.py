"""What `benchmarks.peers` asks of every server: the cells, their requests, and what is made of the answers."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.raw_stream import Answer, stream


@dataclass(frozen=True)
class Cell:
    """One measurement: so many clients send one request after the other.

    The figure is tokens a second over all clients from the first request to the last answer's end: those
    generated, or those of the prompts. Either `num_requests` are sent, or each client sends the same number: one, and
    one more each time that the first of them has an answer before the time is up. So none is left alone at the end.
    """

    name: str
    title: str
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    counted: Literal["output", "prompt"] = "output"
    shared_tokens: int = 0
    num_requests: int | None = None


CELLS = {
    cell.name: cell
    for cell in (
        *(Cell(f"c{clients}", f"c={clients}", clients, 128, 64) for clients in (1, 4, 16, 64)),
        Cell("prefill", "prefill 1,024", 1, 1024, 1, counted="prompt"),
        Cell("shared", "16 × (512 + 64), c=4", 4, 576, 16, shared_tokens=512, num_requests=16),
    )
}


@dataclass(frozen=True)
class Target:
    """Where requests go, and what they say beside the prompt and the number of tokens."""

    base_url: str
    model: str
    extra: dict[str, Any]
    limit: float = 600.0


def prompt(cell: Cell, number: int) -> str:
    """The text of this request, which is `prompt_tokens` tokens: a space and a letter are one each.

    The tokenizers of `benchmarks.shapes` merge printable characters alone, and split before a space. The text
    depends on cell and number, so that every server reads the same and no two prompts begin alike by design.
    """
    shared = random.Random(f"{cell.name}/shared")
    own = random.Random(f"{cell.name}/{number}")
    letters = shared.choices(string.ascii_letters, k=cell.shared_tokens // 2)
    letters += own.choices(string.ascii_letters, k=(cell.prompt_tokens - cell.shared_tokens) // 2)
    return "".join(f" {letter}" for letter in letters)


def body(target: Target, cell: Cell, number: int) -> dict[str, Any]:
    return {
        "model": target.model,
        "prompt": prompt(cell, number),
        "max_tokens": cell.output_tokens,
        "temperature": 0,
        "stream": True,
        **target.extra,
    }


async def measure(target: Target, cell: Cell, *, seconds: float) -> dict[str, Any]:
    """Run the cell for about `seconds` and sum up."""
    numbers = itertools.count() if cell.num_requests is None else iter(range(cell.num_requests))
    answers: list[Answer] = []
    goes_on: dict[int, bool] = {}
    cpu = time.process_time()
    start = time.perf_counter()

    async def client() -> None:
        for num_sent, number in enumerate(numbers, start=1):
            answers.append(await stream(target.base_url, body(target, cell, number), limit=target.limit))
            in_time = cell.num_requests is not None or time.perf_counter() - start < seconds
            if answers[-1].error is not None or not goes_on.setdefault(num_sent, in_time):
                return

    await asyncio.gather(*(client() for _ in range(cell.concurrency)))
    wall = time.perf_counter() - start
    return summarise(cell, answers, client_cpu_share=(time.process_time() - cpu) / wall)


def summarise(cell: Cell, answers: Sequence[Answer], *, client_cpu_share: float) -> dict[str, Any]:
    """The cell's figure, and whether every answer had the tokens that were asked for, by the server's own count.

    `decode_tokens_per_second` is of one answer, from its first text, taken for one token, to its end: the prompt is
    not in it.
    """
    errors = [answer.error for answer in answers if answer.error is not None]
    good = [answer for answer in answers if answer.error is None]
    seconds = max(answer.end for answer in answers) - min(answer.start for answer in answers)
    for answer in good:
        for what, count, wanted in (
            ("prompt", answer.prompt_tokens, cell.prompt_tokens),
            ("output", answer.completion_tokens, cell.output_tokens),
        ):
            if count != wanted:
                errors.append(f"{count} {what} tokens instead of {wanted}")
    num_tokens = len(good) * (cell.output_tokens if cell.counted == "output" else cell.prompt_tokens)
    streams = [one.end - one.first for one in good if one.first is not None and one.end > one.first]
    decode = [(cell.output_tokens - 1) / seconds_of_one for seconds_of_one in streams]
    return {
        "tokens_per_second": num_tokens / seconds if not errors else None,
        "decode_tokens_per_second": statistics.median(decode) if decode and not errors else None,
        "num_requests": len(answers),
        "seconds": seconds,
        "client_cpu_share": client_cpu_share,
        "error": errors[0] if errors else None,
        "num_errors": len(errors),
    }


async def first_token(target: Target, *, started: float) -> float:
    """Seconds from `started` until a short request's first text. Raises RuntimeError where none comes."""
    cell = Cell("first", "first token", 1, 16, 4)
    answer = await stream(target.base_url, body(target, cell, 0), limit=target.limit)
    if answer.error is not None:
        raise RuntimeError(answer.error)
    # Tokens that are no text yet are sent with the end.
    return (answer.first if answer.first is not None else answer.end) - started


async def warm_up(target: Target, cells: Sequence[Cell]) -> None:
    """Show the server each kind of request once, with other prompts than those that are measured."""
    for cell in cells:
        few = Cell(
            f"warm-up/{cell.name}", "", min(cell.concurrency, 16), cell.prompt_tokens, min(cell.output_tokens, 16)
        )
        await measure(target, few, seconds=0.0)
