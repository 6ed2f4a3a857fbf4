"""How `reprise serve` ends, with an engine and an HTTP server that do what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from reprise import serve as serve_module
from reprise.errors import ModelLoadError
from reprise.exit_code import ExitCode
from reprise.generation.interface import EngineState
from reprise.generation.request_stream import RequestStream
from reprise.ipc.messages import EngineStats, LoadProgress, Ready
from reprise.serve import serve_with_engine
from reprise.types import GenerationRequest

if TYPE_CHECKING:
    from reprise.generation.interface import Engine


class FakeEngine:
    """Loads when `may_load` is set, and has no model."""

    def __init__(self, error: Exception | None = None) -> None:
        self.state = EngineState.LOADING
        self.info: Ready | None = None
        self.stats = EngineStats()
        self.load_progress: LoadProgress | None = None
        self.last_progress = 0.0
        self.last_heartbeat = self.last_progress
        self.num_restarts = 0
        self.num_hung = 0
        self.num_recovered = 0
        self.num_lost = 0
        self.num_convicted = 0
        self.num_dropped = 0
        self.num_failed: dict[str, int] = {}
        self.last_recovery_seconds = 0.0
        self.may_load = asyncio.Event()
        self.num_stops = 0
        self._error = error

    async def start(self) -> None:
        await self.may_load.wait()
        if self._error is not None:
            raise self._error
        self.state = EngineState.READY

    async def stop(self) -> None:
        self.num_stops += 1

    def submit(self, request: GenerationRequest) -> RequestStream:
        raise NotImplementedError


class FakeHttp:
    """Listens at once, serves until `may_end` is set."""

    def __init__(self, exit_code: int = 0) -> None:
        self.may_end = asyncio.Event()
        self.cancelled = False
        self._exit_code = exit_code

    async def __call__(self, on_started: Callable[[], None]) -> int:
        on_started()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return self._exit_code


def run(
    scenario: Callable[[FakeEngine, FakeHttp, Callable[[], bool]], None],
    *,
    error: Exception | None = None,
    exit_code: int = 0,
    load_timeout: float = 10.0,
) -> tuple[int | BaseException, FakeEngine, FakeHttp]:
    """Play a scenario in steps of the event loop; returns how serving ended, and the fakes."""

    async def play() -> tuple[int | BaseException, FakeEngine, FakeHttp]:
        engine, http, ready = FakeEngine(error), FakeHttp(exit_code), asyncio.Event()
        checked: Engine = engine
        serving = asyncio.create_task(serve_with_engine(checked, http, load_timeout=load_timeout, on_ready=ready.set))
        for _ in range(10):
            await asyncio.sleep(0)
            if not serving.done():
                scenario(engine, http, ready.is_set)
        (outcome,) = await asyncio.gather(serving, return_exceptions=True)
        return outcome, engine, http

    return asyncio.run(asyncio.wait_for(play(), 10))


def test_http_serves_before_the_model_is_loaded_and_ends_with_its_own_code() -> None:
    seen: list[bool] = []

    def scenario(engine: FakeEngine, http: FakeHttp, is_ready: Callable[[], bool]) -> None:
        seen.append(is_ready())
        if is_ready():
            http.may_end.set()
        elif len(seen) > 2:
            engine.may_load.set()

    outcome, engine, _ = run(scenario, exit_code=1)
    assert outcome == 1
    assert seen[:3] == [False, False, False]
    assert seen[-1] is True
    assert engine.num_stops == 1


def test_a_signal_while_loading_ends_it() -> None:
    outcome, engine, _ = run(lambda _, http, __: http.may_end.set())
    assert outcome == ExitCode.OK
    assert engine.num_stops == 1


def test_a_model_that_cannot_be_loaded_ends_the_http_server_too() -> None:
    outcome, engine, http = run(lambda engine, _, __: engine.may_load.set(), error=ModelLoadError("no weights"))
    assert isinstance(outcome, ModelLoadError)
    assert http.cancelled
    assert engine.num_stops == 1


def test_loading_that_takes_too_long_is_given_up() -> None:
    outcome, engine, http = run(lambda *_: None, load_timeout=0.05)
    assert isinstance(outcome, ModelLoadError)
    assert "longer than load_timeout, 0.05 seconds" in str(outcome)
    assert http.cancelled
    assert engine.num_stops == 1


def test_a_lost_engine_ends_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module, "WATCH_INTERVAL", 0.001)
    monkeypatch.setattr(serve_module, "LAST_WORDS", 0.001)

    def scenario(engine: FakeEngine, _: FakeHttp, is_ready: Callable[[], bool]) -> None:
        engine.may_load.set()
        if is_ready():
            engine.state = EngineState.FAILED

    outcome, engine, http = run(scenario)
    assert outcome == ExitCode.ENGINE_LOST
    assert http.cancelled
    assert engine.num_stops == 1


def test_recovering_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module, "WATCH_INTERVAL", 0.001)
    steps = 0

    def scenario(engine: FakeEngine, http: FakeHttp, is_ready: Callable[[], bool]) -> None:
        nonlocal steps
        engine.may_load.set()
        if is_ready():
            engine.state = EngineState.RECOVERING
            steps += 1
        if steps > 3:
            http.may_end.set()

    assert run(scenario)[0] == ExitCode.OK
