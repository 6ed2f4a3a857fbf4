from __future__ import annotations

import asyncio

import pytest

from reprise.api.deadline import Deadline

pytestmark = pytest.mark.anyio


async def test_a_deadline_calls_once_and_is_then_not_set() -> None:
    called: list[str] = []
    deadline = Deadline(asyncio.get_running_loop())
    assert not deadline.is_set
    deadline.set(0.01, called.append, "reached")
    assert deadline.is_set
    await asyncio.sleep(0.05)
    assert called == ["reached"]
    assert not deadline.is_set


async def test_a_deadline_that_is_set_again_calls_only_what_was_said_last() -> None:
    called: list[str] = []
    deadline = Deadline(asyncio.get_running_loop())
    deadline.set(0.01, called.append, "first")
    deadline.set(0.02, called.append, "second")
    await asyncio.sleep(0.06)
    assert called == ["second"]


async def test_a_cancelled_deadline_calls_nothing() -> None:
    called: list[str] = []
    deadline = Deadline(asyncio.get_running_loop())
    deadline.set(0.01, called.append, "reached")
    deadline.cancel()
    deadline.cancel()
    assert not deadline.is_set
    await asyncio.sleep(0.05)
    assert called == []


async def test_what_a_deadline_calls_may_set_it_again() -> None:
    called: list[int] = []
    deadline = Deadline(asyncio.get_running_loop())
    through = asyncio.Event()

    def again(left: int) -> None:
        called.append(left)
        if left:
            deadline.set(0.005, again, left - 1)
        else:
            through.set()

    deadline.set(0.005, again, 2)
    await through.wait()
    assert called == [2, 1, 0]
    assert not deadline.is_set
