"""What the API layer sees of the engine: submit a request, iterate over its deltas, close it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Protocol

from reprise.generation.request_stream import RequestStream
from reprise.ipc.messages import EngineStats, LoadProgress, Ready
from reprise.types import GenerationRequest


class EngineState(StrEnum):
    """Where the engine process stands, as its supervisor knows it."""

    LOADING = "loading"
    READY = "ready"
    RECOVERING = "recovering"
    FAILED = "failed"
    STOPPED = "stopped"


class Engine(Protocol):
    """The asyncio side of an engine process."""

    @property
    def state(self) -> EngineState: ...

    @property
    def info(self) -> Ready | None:
        """What was loaded; None before it is."""

    @property
    def stats(self) -> EngineStats:
        """Counters over all lives of the process, gauges of the one that lives; every choice either runs or waits."""

    @property
    def load_progress(self) -> LoadProgress | None: ...

    @property
    def last_progress(self) -> float:
        """`time.monotonic()` of the last finished step, or of the last sign of an engine that has nothing to do."""

    @property
    def last_heartbeat(self) -> float:
        """`time.monotonic()` of the last sign of life of the process, in the middle of a step as well."""

    @property
    def num_restarts(self) -> int:
        """Deaths of the engine process, hung ones included."""

    @property
    def num_hung(self) -> int:
        """Engine processes that were killed because they hung."""

    @property
    def num_recovered(self) -> int:
        """Choices that went on after a death of the engine."""

    @property
    def num_lost(self) -> int:
        """Choices that ended with an error because of the engine's death."""

    @property
    def num_convicted(self) -> int:
        """Requests that were given up because the engine died of them."""

    @property
    def num_dropped(self) -> int:
        """Outputs of the engine that were for nobody, or that had come before."""

    @property
    def num_failed(self) -> Mapping[str, int]:
        """Choices that failed in the engine while it lived on, by the code of their error."""

    @property
    def last_recovery_seconds(self) -> float:
        """From a death of the engine to the next token of a choice, of the choice that went on last."""

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Enqueue a request at once. Raises UnavailableError where there is no engine to take it."""

    async def start(self) -> None:
        """Start the process and wait until the model is loaded. Raises ModelLoadError."""

    async def stop(self) -> None:
        """End the process; what is in flight raises UnavailableError in its streams."""
