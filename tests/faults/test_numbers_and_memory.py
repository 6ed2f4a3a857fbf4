"""F08, F09: memory that runs out in a forward, and logits that are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reprise.ipc.messages import Add
from support.engine_driver import Result, build_core, drain, greedy, load_from, run
from support.fault_checks import Watched
from support.faulty_engine import Fault
from support.live_api import COMPLETIONS
from support.promise import InFlight, all_at_once, assert_same, mixed_streams, token_ids

MARKED = 411
"""A token id that no other prompt here has."""
NUM_STREAMS = 12
CALLS = mixed_streams(NUM_STREAMS, 60)
Start = Callable[..., Watched]
Once = Callable[..., Fault]


@pytest.mark.parametrize("action", ["memory", "oom", "allocator"])
def test_f08_a_shortage_that_passes(start_faulty: Start, once: Once, action: Any) -> None:
    """In a prefill and in a decode step. Nobody notices."""
    watched = start_faulty(once(action, at_forward=2), once(action, at_forward=20))
    with InFlight(watched.client, CALLS) as streams:
        found = streams.answers()
    assert watched.count("memory_shortages") >= 2
    assert_same(found, all_at_once(watched.client, CALLS))
    assert watched.count("engine_restarts") == 0
    watched.assert_clean()


def test_f08_a_shortage_that_stays(start_faulty: Start) -> None:
    """There is memory for three sequences at a time: the newest wait, and all end as they would have."""
    watched = start_faulty(Fault("oom", min_sequences=4))
    one_by_one = [all_at_once(watched.client, [call])[0] for call in CALLS]
    with InFlight(watched.client, CALLS) as streams:
        found = streams.answers()
    assert watched.count("memory_shortages") >= 1
    assert_same(found, one_by_one)
    assert watched.count("engine_restarts") == 0
    watched.assert_clean()


def test_f08_a_request_that_never_fits(start_faulty: Start) -> None:
    watched = start_faulty(Fault("memory", token_id=MARKED))
    expected = all_at_once(watched.client, CALLS)
    with InFlight(watched.client, CALLS) as streams:
        streams.wait(lambda: streams.num_tokens > 24)
        response = watched.client.post(COMPLETIONS, json={"prompt": [30, MARKED], "max_tokens": 5})
        assert_same(streams.answers(), expected)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "capacity")
    assert watched.count("engine_restarts") == 0
    watched.assert_clean()


def test_f09_logits_that_are_no_numbers(start_faulty: Start) -> None:
    """Of one row. What it shares with others is not poisoned, and its own blocks are found by nobody."""
    watched = start_faulty(Fault("nan", token_id=MARKED))
    shared = token_ids(64, 5)
    sound = {"prompt": [*shared, 40], "max_tokens": 30, "seed": 4, "logprobs": 2}
    calls = [*CALLS, (COMPLETIONS, {**sound, "ignore_eos": True, "return_token_ids": True})]
    expected = all_at_once(watched.client, calls)
    broken = {"prompt": [*shared, MARKED, 41], "max_tokens": 5}
    with InFlight(watched.client, calls) as streams:
        streams.wait(lambda: streams.num_tokens > 24)
        response = watched.client.post(COMPLETIONS, json=broken)
        assert_same(streams.answers(), expected)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "numerical_error")
    assert 'reprise_choices_failed_total{code="numerical_error"} 1.0' in watched.api.get("/metrics").text
    assert watched.count("engine_restarts") == 0
    assert_same(all_at_once(watched.client, calls), expected)
    watched.assert_clean()


def test_f09_no_numbers_in_the_cache(wide_directory: Path) -> None:
    """NaN in the blocks of one sequence, while others run, in its prefix and in blocks that others get after it."""
    requests = [(token_ids(length, length), greedy(12, seed=length, num_logprobs=2)) for length in (5, 40, 130, 17)]
    victim = (token_ids(60, 99), greedy(40, end_token_ids=(), num_logprobs=2))
    loaded = load_from(wide_directory, kv_cache_memory=1 << 20)
    *expected, whole = run(build_core(loaded, None), [*requests, victim])

    loaded = load_from(wide_directory, kv_cache_memory=1 << 20)
    cache = loaded.runner._cache  # type: ignore[attr-defined]  # of the paged runner
    core = build_core(loaded, None)
    results = {number: Result() for number in range(1, len(requests) + 2)}
    core.add(Add(len(results), 0, *victim))
    for _ in range(3):
        for output in core.step():
            results[output.sequence_id].take(output)
    slots = [i for block in core._sequences[len(results)].block_ids for i in range(block * 4, block * 4 + 4)]
    for keys, values in cache._layers.values():
        keys[slots] = values[slots] = float("nan")
    for number, request in enumerate(requests, 1):
        core.add(Add(number, 0, *request))
    drain(core, results)
    assert results.pop(len(results)).error_code == "numerical_error"
    assert [exact(result) for result in results.values()] == [exact(result) for result in expected]
    assert exact(run(core, [victim], first_id=100)[0]) == exact(whole)

    blocks = core._scheduler.pool._cached
    slots = [i for block in blocks for i in range(block * 4, block * 4 + 4)]
    for keys, values in cache._layers.values():
        keys[slots] = values[slots] = float("nan")
    for first_id in (200, 300):
        found = run(core, [*requests, victim], first_id=first_id)
        assert [exact(result) for result in found] == [exact(result) for result in [*expected, whole]]

    for keys, values in cache._layers.values():
        keys.fill_(float("nan"))
        values.fill_(float("nan"))
    core = build_core(loaded, None)
    assert [exact(result) for result in run(core, requests)] == [exact(result) for result in expected]


def exact(result: Result) -> tuple[object, ...]:
    return result.token_ids, [(entry.logprob, [list(pair) for pair in entry.top]) for entry in result.logprobs]
