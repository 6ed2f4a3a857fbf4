from __future__ import annotations

import json
import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from reprise.api.operations import SILENT_SECONDS, STALE_SECONDS, readiness
from reprise.errors import GenerationError
from reprise.generation.interface import EngineState
from reprise.ipc.messages import EngineStats, LoadProgress
from support.loopback import Loopback, Start
from support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio


async def test_alive_is_not_ready(server: Loopback, engine: ScriptedEngine) -> None:
    assert (await server.get("/ready")).json()["status"] == "ready"
    engine.state = EngineState.LOADING
    engine.info = None
    engine.load_progress = LoadProgress("weights", 0.25)
    assert (await server.get("/health")).status_code == 200
    response = await server.get("/ready")
    assert response.status_code == 503
    assert response.json() == {
        "status": "loading",
        "reason": "The model is loading.",
        "load_stage": "weights",
        "load_fraction": 0.25,
    }
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("state", [state for state in EngineState if state is not EngineState.READY])
async def test_only_an_engine_that_is_ready_is_ready(engine: ScriptedEngine, state: EngineState) -> None:
    engine.state = state
    assert readiness(engine, draining=False, now=engine.last_progress).status == state.value


async def test_readiness_needs_progress(engine: ScriptedEngine) -> None:
    now = engine.last_progress
    engine.last_heartbeat = now + STALE_SECONDS
    assert readiness(engine, draining=False, now=now + STALE_SECONDS).status == "ready"
    engine.last_heartbeat = now + STALE_SECONDS + 60
    stalled = readiness(engine, draining=False, now=now + STALE_SECONDS + 60)
    assert stalled.status == "stalled"
    assert "no step for 90 seconds" in stalled.reason
    assert readiness(engine, draining=True, now=now).status == "draining"


async def test_readiness_needs_a_sign_of_life(engine: ScriptedEngine) -> None:
    now = engine.last_heartbeat = engine.last_progress
    assert readiness(engine, draining=False, now=now + SILENT_SECONDS).status == "ready"
    stalled = readiness(engine, draining=False, now=now + SILENT_SECONDS + 1)
    assert stalled.status == "stalled"
    assert "no sign of life for 6 seconds" in stalled.reason


@pytest.mark.parametrize(
    ("state", "loaded"),
    [(EngineState.LOADING, False), (EngineState.FAILED, True), (EngineState.STOPPED, True)],
)
async def test_work_is_refused_while_there_is_no_engine(
    server: Loopback, engine: ScriptedEngine, state: EngineState, loaded: bool
) -> None:
    engine.state = state
    if not loaded:
        engine.info = None
    response = await server.post("/v1/completions", {"prompt": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "service_unavailable")
    assert int(response.headers["retry-after"]) >= 1


async def test_work_is_taken_while_the_engine_recovers(server: Loopback, engine: ScriptedEngine) -> None:
    engine.state = EngineState.RECOVERING
    assert (await server.post("/v1/completions", {"prompt": "a"})).status_code == 200


async def test_probes_may_use_head(server: Loopback) -> None:
    for path in ("/health", "/ready"):
        response = await server.request("HEAD", path)
        assert (response.status_code, response.content) == (200, b"")


async def test_the_document_describes_every_body(server: Loopback) -> None:
    document = (await server.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/replay", "/tokenize", "/detokenize"):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = content["schema"]["$ref"].rpartition("/")[2]
        assert "properties" in schemas[name]
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= schemas.keys()
    assert "$defs" not in json.dumps(document)


async def test_version(server: Loopback) -> None:
    from reprise import __version__

    assert (await server.get("/version")).json() == {"version": __version__}


def samples(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def test_metrics(server: Loopback, engine: ScriptedEngine) -> None:
    engine.stats = EngineStats(
        num_running=3,
        num_waiting=2,
        num_kv_tokens_used=1024,
        num_preemptions=4,
        num_prompt_tokens=100,
        num_cached_tokens=60,
        num_generated_tokens=50,
        num_memory_shortages=7,
    )
    engine.num_restarts, engine.num_hung = 3, 1
    engine.num_recovered, engine.num_lost, engine.num_convicted, engine.num_dropped = 12, 2, 1, 5
    engine.num_failed = {"numerical_error": 2, "capacity": 1}
    engine.last_recovery_seconds = 0.25
    await server.post("/v1/completions", {"prompt": "a", "max_tokens": 4})
    await server.stream("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    await server.get("/v1/models/unknown")
    await server.get("/some/path/of/a/scanner")
    response = await server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = samples(response.text)
    assert all(name.startswith("reprise_") for name in found)
    requests = found["reprise_requests_total"]
    assert requests[("route", "/v1/completions"), ("status", "200")] == 1
    assert requests[("route", "/v1/models/{model:path}"), ("status", "404")] == 1
    assert requests[("route", "unmatched"), ("status", "404")] == 1
    assert "scanner" not in response.text
    single: dict[str, Any] = {
        name: values[()] for name, values in found.items() if () in values and not name.endswith("_created")
    }
    assert single["reprise_num_requests_running"] == 3
    assert single["reprise_num_requests_waiting"] == 2
    assert single["reprise_kv_cache_usage_perc"] == 0.25
    assert single["reprise_num_preemptions_total"] == 4
    assert single["reprise_prompt_tokens_total"] == 100
    assert single["reprise_cached_prompt_tokens_total"] == 60
    assert single["reprise_generation_tokens_total"] == 50
    assert single["reprise_engine_restarts_total"] == 3
    assert single["reprise_engine_hangs_total"] == 1
    assert single["reprise_choices_recovered_total"] == 12
    assert single["reprise_choices_lost_total"] == 2
    assert single["reprise_requests_convicted_total"] == 1
    assert single["reprise_outputs_dropped_total"] == 5
    assert single["reprise_last_recovery_seconds"] == 0.25
    assert single["reprise_memory_shortages_total"] == 7
    # Each from the start, or `rate` and `increase` would miss the first one.
    assert found["reprise_choices_failed_total"] == {
        (("code", "capacity"),): 1,
        (("code", "forward_error"),): 0,
        (("code", "internal_error"),): 0,
        (("code", "no_admissible_token"),): 0,
        (("code", "numerical_error"),): 2,
    }
    assert single["reprise_admission_rejections_total"] == 0
    assert single["reprise_time_to_first_token_seconds_count"] == 2
    assert single["reprise_e2e_request_latency_seconds_count"] == 2
    assert single["reprise_inter_token_latency_seconds_count"] > 3
    assert found["reprise_engine_state"][(("state", "ready"),)] == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_what_fails_has_no_latency(server: Loopback, engine: ScriptedEngine, stream: bool) -> None:
    engine.enqueue([GenerationError("it broke", code="internal_error")])
    await server.post("/v1/completions", {"prompt": "a", "stream": stream})
    counts = samples((await server.get("/metrics")).text)["reprise_e2e_request_latency_seconds_count"]
    assert counts[()] == 0


async def test_metrics_can_be_switched_off(start: Start) -> None:
    async with start(metrics=False) as server:
        assert (await server.get("/metrics")).status_code == 404


async def test_two_servers_in_a_process_count_for_themselves(start: Start) -> None:
    async with start() as one, start() as other:
        await one.get("/version")
        assert "/version" in (await one.get("/metrics")).text
        assert "/version" not in (await other.get("/metrics")).text
