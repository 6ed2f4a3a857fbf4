from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprise.api.admission import Admission, Ticket
from reprise.errors import InvalidRequestError, OverloadedError
from reprise.types import ChoiceDelta, FinishReason
from support.loopback import Loopback, Start, eventually
from support.scripted_engine import ScriptedEngine


@given(st.lists(st.tuples(st.sampled_from(["reserve", "end", "release"]), st.integers(0, 7)), max_size=60))
def test_reservations_never_pass_the_limit_and_all_come_back(steps: list[tuple[str, int]]) -> None:
    """Running and waiting ones, that is: as many again may have ended. More of those take the places of others."""
    admission = Admission(max_num_seqs=2, max_waiting_seqs=3)
    live: list[tuple[Ticket, int]] = []
    ended: list[tuple[Ticket, int]] = []
    for step, number in steps:
        if step == "reserve":
            places = admission.limit - sum(size for _, size in live)
            places -= max(0, sum(size for _, size in ended) - admission.limit)
            fits = number <= places
            with contextlib.nullcontext() if fits else pytest.raises((OverloadedError, InvalidRequestError)):
                live.append((admission.reserve(number), number))
        elif step == "end" and live:
            ended.append(live.pop(number % len(live)))
            for _ in range(2):
                ended[-1][0].end()
        elif step == "release" and (live or ended):
            held = live if live and (number % 2 or not ended) else ended
            ticket, _ = held.pop(number % len(held))
            for _ in range(2):
                ticket.release()
                ticket.end()
        assert sum(size for _, size in live) <= admission.limit
        assert admission.num_reserved == sum(size for _, size in live + ended) <= 2 * admission.limit
    for ticket, _ in live + ended:
        ticket.release()
    assert (admission.num_reserved, admission.num_ended) == (0, 0)


def test_what_can_never_fit_is_no_overload() -> None:
    admission = Admission(max_num_seqs=2, max_waiting_seqs=0)
    assert isinstance(admission.reserve(2), Ticket)
    with pytest.raises(InvalidRequestError):
        admission.reserve(3)
    with pytest.raises(OverloadedError):
        admission.reserve(1)
    with pytest.raises(OverloadedError):
        admission.check_room()
    assert admission.num_rejections == 2


@pytest.mark.anyio
async def test_a_burst_is_bounded_and_ends_well(start: Start, engine: ScriptedEngine) -> None:
    hold = asyncio.Event()
    for _ in range(8):
        engine.enqueue([hold, ChoiceDelta(index=0, text="a", finish_reason=FinishReason.STOP)])
    async with start(max_num_seqs=3, max_waiting_seqs=5) as server:
        asking = [asyncio.create_task(server.post("/v1/completions", {"prompt": "a"})) for _ in range(40)]
        await eventually(lambda: sum(task.done() for task in asking) == 32)
        assert len(engine.requests) == 8
        assert server.app.state.service.admission.num_reserved == 8
        hold.set()
        answers = await asyncio.gather(*asking)
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) == 32
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert all(answer.json()["error"]["code"] == "rate_limit_exceeded" for answer in refused)
        assert sorted({answer.status_code for answer in answers}) == [200, 429]
        await eventually(lambda: server.app.state.service.admission.num_reserved == 0)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [9999]},
        {"prompt": "x" * 10_000},
        {"prompt": "a", "n": 3, "model": "unknown"},
        {"prompt": "a", "temperature": 5},
        {"prompt": "a"},
        {"prompt": "a", "stream": True, "n": 2},
    ],
)
async def test_every_end_of_a_request_gives_its_ticket_back(server: Loopback, body: dict[str, object]) -> None:
    await server.post("/v1/completions", body)
    await eventually(lambda: server.app.state.service.admission.num_reserved == 0)
