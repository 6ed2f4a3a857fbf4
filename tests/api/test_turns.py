from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from reprise.api.turns import Turns

pytestmark = pytest.mark.anyio


async def test_a_few_pass_in_each_turn_in_the_order_in_which_they_came() -> None:
    turns, passed = Turns(2), []

    async def one(number: int) -> None:
        await turns.take()
        passed.append(number)

    tasks = [asyncio.create_task(one(number)) for number in range(7)]
    passed_by_turn = []
    while len(passed) < 7:
        await asyncio.sleep(0)
        passed_by_turn.append(len(passed))
    assert passed == list(range(7))
    assert passed_by_turn[0] == 2
    assert max(after - before for before, after in pairwise(passed_by_turn)) == 2
    await asyncio.gather(*tasks)


async def test_one_alone_does_not_wait() -> None:
    turns = Turns(1)
    for _ in range(3):
        with pytest.raises(StopIteration):
            turns.take().send(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_one_that_leaves_takes_nobodys_turn() -> None:
    turns = Turns(1)
    first, left, last = (asyncio.create_task(turns.take()) for _ in range(3))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.wait_for(asyncio.gather(first, last), timeout=5)
    assert left.cancelled()
