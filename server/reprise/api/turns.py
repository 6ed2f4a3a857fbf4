"""A few at a time: what begins at once shall not hold up what runs."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Lets `at_once` callers pass in each turn of the event loop, in the order in which they came."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._num_left = at_once
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        """Go on at once, or in a later turn where that many have gone on in this one."""
        loop = asyncio.get_running_loop()
        if self._num_left == self._at_once:
            loop.call_soon(self._begin_turn, loop)
        if self._num_left:
            self._num_left -= 1
            return
        waiting = loop.create_future()
        self._waiting.append(waiting)
        await waiting

    def _begin_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._num_left = self._at_once
        while self._waiting and self._num_left:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)
                self._num_left -= 1
        if self._num_left < self._at_once:
            loop.call_soon(self._begin_turn, loop)
