"""Threads for work on text, so that long ones do not hold up the streams of others."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from reprise.api.turns import Turns
from reprise.errors import OverloadedError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
GOING_ON_AT_ONCE = 2
"""Requests that go on in one turn of the event loop, of those whose work is done: each may take a millisecond."""


class TextThreads:
    """A pool, and how many requests may use it at once. `limit`: None where they are admitted elsewhere."""

    def __init__(self, num_threads: int, *, limit: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reprise-text")
        self._limit = limit
        self._turns = Turns(GOING_ON_AT_ONCE)
        self.num_admitted = 0

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A request's place, until the block ends. Raises OverloadedError where there is none."""
        self.check_room()
        self.num_admitted += 1
        try:
            yield
        finally:
            self.num_admitted -= 1

    def check_room(self) -> None:
        """Raises OverloadedError where there is no place."""
        if self._limit is not None and self.num_admitted >= self._limit:
            raise OverloadedError(
                f"The server is at its limit of {self._limit} requests for tokens of texts. Try again later."
            )

    async def run(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Call in a thread."""
        call = functools.partial(function, *args, **kwargs)
        result = await asyncio.get_running_loop().run_in_executor(self._pool, call)
        await self._turns.take()
        return result

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
