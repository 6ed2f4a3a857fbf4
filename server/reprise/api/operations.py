"""What operators ask: alive, ready, metrics, version."""

from __future__ import annotations

import time

import msgspec
from fastapi import Request, Response
from msgspec import UNSET
from prometheus_client import CONTENT_TYPE_LATEST

from reprise import __version__
from reprise.api.body import json_response
from reprise.api.service import Service
from reprise.generation.interface import Engine, EngineState
from reprise.protocol.responses import Readiness

STALE_SECONDS = 30.0
"""An engine that shows no progress for so long is not ready, whatever it says of itself."""
SILENT_SECONDS = 5.0
"""Nor is one whose process shows no sign of life for so long."""


class Version(msgspec.Struct, frozen=True):
    version: str


class Health(msgspec.Struct, frozen=True):
    status: str


def readiness(engine: Engine, *, draining: bool, now: float) -> Readiness:
    """Whether a request sent now would be answered, and why not. now: of `time.monotonic()`."""
    if draining:
        return Readiness("draining", "The server is shutting down: running requests finish, new ones are refused.")
    stale = now - engine.last_progress
    silent = now - engine.last_heartbeat
    match engine.state:
        case EngineState.READY if silent > SILENT_SECONDS:
            return Readiness("stalled", f"The engine process has shown no sign of life for {silent:.0f} seconds.")
        case EngineState.READY if stale > STALE_SECONDS:
            return Readiness("stalled", f"The engine has finished no step for {stale:.0f} seconds.")
        case EngineState.READY:
            return Readiness("ready", "The engine makes progress.")
        case EngineState.LOADING:
            progress = engine.load_progress
            return Readiness(
                "loading",
                "The model is loading.",
                progress.stage if progress is not None else UNSET,
                progress.fraction if progress is not None else UNSET,
            )
        case EngineState.RECOVERING:
            return Readiness("recovering", "The engine died and is being started again.")
        case EngineState.FAILED:
            return Readiness("failed", "The engine is lost and could not be started again.")
        case EngineState.STOPPED:
            return Readiness("stopped", "The engine is not running.")


async def health() -> Response:
    """200 as long as the process answers at all: for liveness probes."""
    return json_response(Health("ok"))


async def ready(request: Request) -> Response:
    """200 if a request would be answered now, else 503 with the reason: for probes and balancers."""
    service: Service = request.app.state.service
    found = readiness(service.engine, draining=service.draining, now=time.monotonic())
    if found.status == "ready":
        return json_response(found)
    return json_response(found, status=503, headers={"retry-after": "1"})


async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms for Prometheus."""
    service: Service = request.app.state.service
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def version() -> Response:
    return json_response(Version(__version__))
