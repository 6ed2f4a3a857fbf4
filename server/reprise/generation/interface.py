"""What the API layer sees of the engine: submit a request, iterate over its deltas, close it."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from reprise.ipc.messages import EngineStats, LoadProgress, Ready
from reprise.types import ChoiceDelta, GenerationRequest


class EngineState(StrEnum):
    """Where the engine process stands, as its supervisor knows it."""

    LOADING = "loading"
    READY = "ready"
    RECOVERING = "recovering"
    FAILED = "failed"
    STOPPED = "stopped"


class GenerationStream(Protocol):
    """An async iterator over the deltas of all choices of one request.

    Ends after the last choice's delta with a finish reason. Raises GenerationError or UnavailableError where
    the generation cannot be completed.
    """

    def __aiter__(self) -> GenerationStream: ...

    async def __anext__(self) -> ChoiceDelta: ...

    def close(self) -> None:
        """Abort what still runs. Idempotent, and never awaits: it is safe in a cancelled task."""


class Engine(Protocol):
    """The asyncio side of an engine process."""

    @property
    def state(self) -> EngineState: ...

    @property
    def info(self) -> Ready | None:
        """What was loaded; None before it is."""

    @property
    def stats(self) -> EngineStats: ...

    @property
    def load_progress(self) -> LoadProgress | None: ...

    @property
    def last_progress(self) -> float:
        """`time.monotonic()` of the last sign that the engine finished a step or idled in good health."""

    @property
    def num_restarts(self) -> int: ...

    def submit(self, request: GenerationRequest) -> GenerationStream:
        """Enqueue a request at once. Raises UnavailableError where there is no engine to take it."""

    async def start(self) -> None:
        """Start the process and wait until the model is loaded. Raises ModelLoadError."""

    async def stop(self) -> None:
        """End the process; what is in flight raises UnavailableError in its streams."""
