"""What is to be done unless something else comes first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVarTuple

Arguments = TypeVarTuple("Arguments")


class Deadline:
    """One call on `loop`, which can be put off or called off."""

    __slots__ = ("_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def is_set(self) -> bool:
        """Whether a call is to come."""
        return self._handle is not None

    def set(self, seconds: float, act: Callable[[*Arguments], object], *arguments: *Arguments) -> None:
        """Make this call after so many seconds, in place of one that is to come."""
        self.cancel()

        def reached() -> None:
            self._handle = None
            act(*arguments)

        self._handle = self._loop.call_later(seconds, reached)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
