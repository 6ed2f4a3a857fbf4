"""F06, F07: a request that makes the forward pass fail, or ends the process. It gets the error, nobody else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from support.fault_checks import Watched
from support.faulty_engine import Fault
from support.live_api import COMPLETIONS
from support.promise import Folded, InFlight, all_at_once, assert_same, mixed_streams, read_stream

POISON = 411
OTHER_POISON = 412
"""Token ids that no other prompt here has."""
NUM_STREAMS = 12
CALLS = mixed_streams(NUM_STREAMS, 200)
Start = Callable[..., Watched]


def poison(**parameters: Any) -> dict[str, Any]:
    return {"prompt": [30, 31, POISON, 32], "max_tokens": 50, "temperature": 0, "ignore_eos": True, **parameters}


def ask_poison(watched: Watched, *, streamed: bool, **parameters: Any) -> tuple[int, dict[str, Any]]:
    """The status and the error that the poisonous request ends with."""
    if not streamed:
        response = watched.client.post(COMPLETIONS, json=poison(**parameters))
        return response.status_code, response.json()["error"]
    folded = Folded()
    try:
        read_stream(watched.client, (COMPLETIONS, poison(**parameters)), folded)
    except AssertionError:
        # Told before the stream's first byte: as a status.
        response = watched.client.post(COMPLETIONS, json=poison(**parameters, stream=True))
        return response.status_code, response.json()["error"]
    assert folded.num_ends == 1
    assert folded.error is not None
    return 500, folded.error


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_f06_a_request_that_makes_the_forward_fail(start_faulty: Start, streamed: bool) -> None:
    watched = start_faulty(Fault("raise", token_id=POISON))
    expected = all_at_once(watched.client, CALLS)
    with InFlight(watched.client, CALLS) as streams:
        streams.wait(lambda: streams.num_tokens > 60)
        status, error = ask_poison(watched, streamed=streamed)
        assert streams.num_running >= NUM_STREAMS // 2
        assert_same(streams.answers(), expected)
    assert (status, error["code"]) == (500, "forward_error")
    assert watched.count("engine_restarts") == 0
    watched.assert_clean()


@pytest.mark.parametrize("action", ["abort", "exit"])
def test_f07_a_request_that_ends_the_process(start_faulty: Start, action: Any) -> None:
    """After two deaths it is tried alone, and found guilty by the third. The next one of its kind is as well."""
    watched = start_faulty(Fault(action, token_id=POISON))
    expected = all_at_once(watched.client, CALLS)
    with InFlight(watched.client, CALLS) as streams:
        streams.wait(lambda: streams.num_tokens > 60)
        status, error = ask_poison(watched, streamed=False)
        found = streams.answers()
    assert (status, error["code"]) == (500, "internal_error")
    assert_same(found, expected)
    assert 2 <= watched.count("engine_restarts") <= 3
    assert watched.count("requests_convicted") == 1
    watched.assert_clean()

    deaths = watched.count("engine_restarts")
    status, error = ask_poison(watched, streamed=True)
    assert (status, error["code"]) == (500, "internal_error")
    assert watched.count("engine_restarts") == deaths + 2
    assert watched.count("requests_convicted") == 2
    watched.assert_clean()


def test_f07_four_poisonous_requests_do_not_end_the_server(start_faulty: Start) -> None:
    watched = start_faulty(Fault("abort", token_id=POISON))
    for count in range(1, 4):
        status, _ = ask_poison(watched, streamed=False)
        assert status == 500
        assert watched.count("requests_convicted") == count
    watched.assert_clean()
    assert httpx.get(watched.server.base_url + "/ready").status_code == 200


def test_f07_two_requests_that_the_kernel_kills_the_engine_for(start_faulty: Start) -> None:
    """As where one prompt takes more memory than there is. No life gives a token until both are given up."""
    watched = start_faulty(Fault("kill", token_id=POISON), Fault("kill", token_id=OTHER_POISON))
    for count, token_id in enumerate((POISON, OTHER_POISON), 1):
        status, error = ask_poison(watched, streamed=False, prompt=[30, token_id])
        assert (status, error["code"]) == (500, "internal_error")
        assert watched.count("requests_convicted") == count
        assert watched.count("engine_restarts") == 3 * count
    watched.assert_clean()
    assert watched.api.complete("a", max_tokens=3, ignore_eos=True).choices[0].finish_reason == "length"
