"""Compare this server with vLLM's CPU build, the llama.cpp server and `transformers serve` on this machine.

One server runs at a time; in every further round they run in the reverse order. A figure is the median over the
rounds. Each server gets the same prompts as text and answers greedily; all tokens are counted by the server's own
usage, and a cell in which one is missing has no figure. Random weights in the shape of a known model stand for it,
since speed does not depend on them.

  c=N                    output tokens a second of N clients; 128 tokens of prompt, 64 of output
  prefill 1,024          prompt tokens a second of requests with 1,024 tokens and one of output, one at a time
  16 x (512 + 64), c=4   output tokens a second of 16 requests by 4 clients: 512 tokens that all share and that the
                         server has not seen before, 64 of their own, 16 of output
  ready, first token     seconds from the start of the process, loading included
  of the floor           the share of what the machine allows by its rates of reading and multiplying, as they are just
                         before and after the server ran, the better of both; with one client from an answer's first
                         token to its end; of a prompt the products with the layers' matrices alone
  attention counted      the same with the products of a prompt's attention
  RSS, PSS               peak resident memory of all processes, shared pages counted in each; and what they took
                         after a cell at most, shared pages counted once

The peers are looked for below --peers, and downloaded and built there where they are missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import peer_cells
from benchmarks.bar_chart import Panel, bar_chart
from benchmarks.peer_builds import NotAvailableError, model_directory
from benchmarks.peer_cells import CELLS, Cell, Target
from benchmarks.peer_servers import DEFAULT_SERVERS, SERVERS, Server, running
from benchmarks.report import figure_text, print_report, table
from benchmarks.shapes import attention_operations, layer_matrix_parameters

SHAPES_COMPARED = ("smollm2-135m", "qwen3-0.6b")
SHAPES_POSSIBLE = ("tiny", *SHAPES_COMPARED)
READY_TIMEOUT = 900.0
FLOOR_MEASURES = {
    "c1": ("c1", "decode_tokens_per_second"),
    "prefill": ("prefill", "tokens_per_second"),
    "prefill, attention counted": ("prefill", "tokens_per_second"),
}
"""By floor: the figure that it is the limit of, as cell and measure."""
FLOOR_ROWS = {
    "of the floor": {"c1": "c1", "prefill": "prefill"},
    "of it, attention counted": {"prefill": "prefill, attention counted"},
}
"""By row of the table: the floor of each cell."""
FLOOR_SECONDS = 1.0
"""For each rate that is measured."""
OVERHEADS = ("ready_seconds", "first_token_seconds", "peak_rss_bytes", "pss_bytes")

Figures = Mapping[str, Mapping[str, float | None]]
"""By server, by cell: the figure."""
Rounds = Mapping[str, Sequence[Mapping[str, Any]]]
"""By server: what `measure_server` found in each round, and the floors around it."""


async def measure_server(
    server: Server, *, peers: Path, shape: str, cells: Sequence[Cell], seconds: float, settle: float
) -> dict[str, Any]:
    """Start the server, measure every cell, stop it. What fails is in the result's errors."""
    with running(server, peers=peers, shape=shape) as process:
        ready = process.wait_until_ready(READY_TIMEOUT)
        target = Target(process.base_url, process.command.model, process.command.extra)
        first = await peer_cells.first_token(target, started=process.started)
        await peer_cells.warm_up(target, cells)
        await asyncio.sleep(settle)
        process.note_memory()
        measured = {}
        for cell in cells:
            measured[cell.name] = await peer_cells.measure(target, cell, seconds=seconds)
            process.note_memory()
            note(f"{shape} {server.name} {cell.title}: {figure_text(measured[cell.name]['tokens_per_second'])}")
            if error := measured[cell.name]["error"]:
                note(f"  {error}")
        return {
            "arguments": process.command.arguments,
            "environ": process.command.environ,
            "cells": measured,
            "ready_seconds": ready,
            "first_token_seconds": first,
            "peak_rss_bytes": sum(process.peaks.values()),
            "pss_bytes": process.largest_share,
        }


def attempt(server: Server, **settings: Any) -> dict[str, Any]:
    """The measures of one server in one round, or the reason why there are none."""
    try:
        return asyncio.run(measure_server(server, **settings))
    except (NotAvailableError, RuntimeError) as error:
        note(f"{settings['shape']} {server.name}: {error}")
        return {"cells": {}, "error": str(error)}


def median_or_none(values: Sequence[float | None]) -> float | None:
    """The median where every round has a figure."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known and len(known) == len(values) else None


def figures(rounds: Rounds, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """The median of each server's rounds for each cell."""
    return {
        name: {
            cell.name: median_or_none([one["cells"].get(cell.name, {}).get("tokens_per_second") for one in of_server])
            for cell in cells
        }
        for name, of_server in rounds.items()
    }


def best_peer(measured: Figures, cell: str, precision: str) -> tuple[str, float] | None:
    """The fastest server of others with these weights in this cell."""
    candidates = [
        (name, figure)
        for name, of_server in measured.items()
        if (figure := of_server.get(cell)) is not None
        and not SERVERS[name].ours
        and SERVERS[name].precision == precision
    ]
    return max(candidates, key=lambda candidate: candidate[1], default=None)


def ratios(measured: Figures, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Of each of our servers: its figure over that of the cell's best peer, and the geometric mean."""
    result: dict[str, dict[str, Any]] = {}
    for name, of_server in measured.items():
        if not SERVERS[name].ours:
            continue
        by_cell: dict[str, Any] = {}
        for cell in cells:
            best = best_peer(measured, cell.name, SERVERS[name].precision)
            ours = of_server.get(cell.name)
            if best is not None and ours is not None:
                by_cell[cell.name] = {"ratio": ours / best[1], "best_peer": best[0]}
        logarithms = [math.log(entry["ratio"]) for entry in by_cell.values()]
        complete = len(by_cell) == len(cells)
        mean = math.exp(statistics.fmean(logarithms)) if logarithms else None
        result[name] = {"cells": by_cell, "geometric_mean": mean, "complete": complete}
    return result


def measure_floors(seconds: float) -> dict[str, Any]:
    """What `benchmarks.floors` says, in a process of its own that is gone when the servers run."""
    command = [sys.executable, "-m", "benchmarks.floors", "--device", "cpu", "--seconds", str(seconds)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    floors: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return floors


def read_floors(shape: str, options: argparse.Namespace) -> dict[str, float]:
    """The `floor_rates` of now."""
    weight_bytes = (model_directory(options.peers, shape) / "model.safetensors").stat().st_size
    return floor_rates(measure_floors(min(options.seconds, FLOOR_SECONDS)), shape, weight_bytes)


def floor_rates(floors: Mapping[str, Any], shape: str, weight_bytes: int) -> dict[str, float]:
    """Tokens a second that bfloat16 weights allow: read once for a token, or multiplied at the matrix rate."""
    # Where a CPU has no instructions for bfloat16, float32 is what it can do.
    rate = max(of_format["many_rows"] for of_format in floors["operations_per_second"].values())
    num_tokens = CELLS["prefill"].prompt_tokens
    layers, attention = 2 * layer_matrix_parameters(shape), attention_operations(shape, num_tokens) / num_tokens
    return {
        "c1": floors["read_bytes_per_second"] / weight_bytes,
        "prefill": rate / layers,
        "prefill, attention counted": rate / (layers + attention),
    }


def rows_of_shape(shape: str, result: Mapping[str, Any], cells: Sequence[Cell]) -> list[list[str]]:
    """Figures, then our ratios, then the shares of the floors."""
    rows = [[shape, *(cell.title for cell in cells), "mean", "ready", "first token", "RSS GB", "PSS GB", "client CPU"]]
    for name, of_server in result["figures"].items():
        numbers = [result["overheads"][name][what] for what in OVERHEADS]
        seconds = ["–" if value is None else f"{value:.1f} s" for value in numbers[:2]]
        sizes = ["–" if value is None else f"{value / 1e9:.2f}" for value in numbers[2:]]
        share = result["client_cpu_share"][name]
        shown = [figure_text(of_server[cell.name]) for cell in cells]
        rows.append([name, *shown, "", *seconds, *sizes, "–" if share is None else f"{share:.0%}"])
    blank = [""] * 5
    for name, ratio in result["ratios"].items():
        entries = [ratio["cells"].get(cell.name) for cell in cells]
        shown = ["–" if entry is None else f"{entry['ratio']:.2f}" for entry in entries]
        mean = "–" if ratio["geometric_mean"] is None else f"{ratio['geometric_mean']:.2f}"
        rows.append([f"{name} ÷ best peer", *shown, mean if ratio["complete"] else f"({mean})", *blank])
    for name, shares in result["floor_shares"].items():
        for title, floors in FLOOR_ROWS.items():
            found = [shares.get(floors.get(cell.name, "")) for cell in cells]
            if any(share is not None for share in found):
                rows.append([f"{name} {title}", *("" if one is None else f"{one:.0%}" for one in found), "", *blank])
    return rows


def floor_shares(rounds: Rounds) -> dict[str, dict[str, float]]:
    """Of each server with bfloat16 weights, by floor: what it reached of those of its rounds, in the median."""
    shares: dict[str, dict[str, float]] = {}
    for name, of_server in rounds.items():
        for limit, (cell, measure) in FLOOR_MEASURES.items():
            reached = [(one["cells"].get(cell, {}).get(measure), one["floors"][limit]) for one in of_server]
            share = median_or_none([None if figure is None else figure / floor for figure, floor in reached])
            if share is not None and SERVERS[name].precision == "bf16":
                shares.setdefault(name, {})[limit] = share
    return shares


def run_shape(
    shape: str, servers: Sequence[Server], cells: Sequence[Cell], options: argparse.Namespace
) -> dict[str, Any]:
    """All rounds of a shape. A server that failed is not tried again."""
    rounds: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
    floors = read_floors(shape, options)
    for number in range(options.rounds):
        order = list(servers) if number % 2 == 0 else list(reversed(servers))
        for server in order:
            if not any("error" in one for one in rounds[server.name]):
                settings = {"cells": cells, "seconds": options.seconds, "settle": options.settle}
                measured = attempt(server, peers=options.peers, shape=shape, **settings)
                before, floors = floors, read_floors(shape, options)
                # A machine that others use as well is quick in one minute and slow in the next.
                measured["floors"] = {name: max(before[name], floors[name]) for name in floors}
                rounds[server.name].append(measured)
    medians = figures(rounds, cells)
    overheads = {
        name: {what: median_or_none([one.get(what) for one in of_server]) for what in OVERHEADS}
        for name, of_server in rounds.items()
    }
    client = {
        name: max((cell["client_cpu_share"] for one in of_server for cell in one["cells"].values()), default=None)
        for name, of_server in rounds.items()
    }
    return {
        "figures": medians,
        "ratios": ratios(medians, cells),
        "floor_shares": floor_shares(rounds),
        "overheads": overheads,
        "client_cpu_share": client,
        "rounds": rounds,
    }


def panels(shape: str, result: Mapping[str, Any], cells: Sequence[Cell]) -> tuple[str, list[Panel]]:
    """A heading and a panel for each cell, of the servers that have a figure at all."""
    present = [
        name for name, of_server in result["figures"].items() if any(value is not None for value in of_server.values())
    ]
    heading = f"{shape}: tokens per second, longer is better"
    return heading, [
        Panel(cell.title, {name: result["figures"][name][cell.name] for name in present}) for cell in cells
    ]


def note(text: str) -> None:
    print(f"peers: {text}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("~/.cache/reprise-peers"), help="default: %(default)s")
    parser.add_argument(
        "--servers", nargs="+", choices=SERVERS, default=DEFAULT_SERVERS, metavar="NAME",
        help=f"of {', '.join(SERVERS)} (default: {' '.join(DEFAULT_SERVERS)})",
    )  # fmt: skip
    parser.add_argument("--shapes", nargs="+", choices=SHAPES_POSSIBLE, help=f"default: {' '.join(SHAPES_COMPARED)}")
    parser.add_argument("--cells", nargs="+", choices=CELLS, help="default: all")
    parser.add_argument("--rounds", type=int, help="default: 2")
    parser.add_argument(
        "--seconds", type=float,
        help="clients start requests for so long in each cell, at least one and all the same number (default: 10)",
    )  # fmt: skip
    parser.add_argument("--settle", type=float, default=12.0, help="idle seconds after warming up (default: 12)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few minutes, unless said otherwise: the small shape, one round of 2 seconds, few cells",
    )
    parser.add_argument("--plot", type=Path, help="SVG file to draw the figures into")
    options = parser.parse_args(arguments)
    for name, full, quick in (
        ("shapes", SHAPES_COMPARED, ("smollm2-135m",)),
        ("cells", tuple(CELLS), ("c1", "c4", "prefill")),
        ("rounds", 2, 1),
        ("seconds", 10.0, 2.0),
    ):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    options.peers = options.peers.expanduser().resolve()
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    # As an exception, so that a server that runs is stopped on the way out.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return compare(options)
    finally:
        signal.signal(signal.SIGTERM, before)


def compare(options: argparse.Namespace) -> int:
    """Measure, print, draw. Returns 0 where each of our servers has a figure and a peer in every cell."""
    servers = [SERVERS[name] for name in options.servers]
    cells = [CELLS[name] for name in options.cells]
    load = os.getloadavg()[0]
    if load > 0.5:
        note(f"the machine is busy (load {load:.1f}): the figures will not be its best")
    shapes: dict[str, dict[str, Any]] = {}
    for shape in options.shapes:
        result = shapes[shape] = run_shape(shape, servers, cells, options)
        if shape != options.shapes[-1]:
            print(table(rows_of_shape(shape, result, cells)), end="\n\n", flush=True)
    if options.plot:
        groups = dict(panels(shape, result, cells) for shape, result in shapes.items())
        ours = [server.name for server in servers if server.ours]
        options.plot.write_text(bar_chart(groups, emphasised=ours), encoding="utf-8")
    report = {
        "benchmark": "peers",
        "cpu": platform.processor() or platform.machine(),
        "load_average_before": load,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "shapes": shapes,
    }
    print_report(rows_of_shape(options.shapes[-1], shapes[options.shapes[-1]], cells), report)
    return 0 if all(ratio["complete"] for result in shapes.values() for ratio in result["ratios"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
