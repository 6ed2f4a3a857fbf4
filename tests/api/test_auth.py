from __future__ import annotations

import time

import pytest
from pydantic import SecretStr

from support.loopback import Loopback, Start
from support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio

KEYS = [SecretStr("first-Key"), SecretStr("second-Key")]
PUBLIC = {"/health", "/ready"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def routes(server: Loopback) -> list[tuple[str, str]]:
    """Every method and path that the app knows, its own document included."""
    return [
        (method, route.path)
        for route in server.app.routes
        for method in getattr(route, "methods", None) or ()
        if hasattr(route, "path")
    ]


async def test_every_route_needs_a_key_but_the_public_ones(start: Start) -> None:
    async with start(api_key=KEYS) as server:
        known = routes(server)
        assert ("POST", "/v1/chat/completions") in known
        assert ("GET", "/metrics") in known
        assert ("GET", "/openapi.json") in known
        for method, path in known:
            response = await server.client.request(method, path)
            if path in PUBLIC:
                assert response.status_code == 200, path
            else:
                assert response.status_code == 401, path


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/V1/models",
        "/%76%31/models",
        "/v1%2Fmodels",
        "/health/../v1/models",
        "/health%2F..%2Fv1%2Fmodels",
        "/health/",
        "//health",
        "/health;/v1/models",
        "/ready/v1/models",
        "/v1/models?api_key=first-Key",
        "/v1/models?key=first-Key",
        "/nothing",
    ],
)
async def test_no_spelling_of_a_path_gets_around(start: Start, path: str) -> None:
    async with start(api_key=KEYS, allowed_hosts=["*"]) as server:
        reader, writer = await server.connect()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost/health?\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 401 "), answer
        writer.close()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer("FIRST-KEY"),
        bearer("first-Ke"),
        bearer("first-Keyx"),
        {"Authorization": "Bearer -"},
        {"Authorization": "first-Key"},
        {"Authorization": "Basic first-Key"},
        {"Authorization": "Bearer"},
        {"X-Api-Key": "first-Key"},
        {"Cookie": "Authorization=Bearer first-Key"},
        [("Authorization", "Bearer first-Key"), ("Authorization", "Bearer wrong")],
        [("Authorization", "Bearer wrong"), ("Authorization", "Bearer first-Key")],
    ],
)
async def test_refused_keys(start: Start, headers: object) -> None:
    async with start(api_key=KEYS) as server:
        response = await server.get("/v1/models", headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_api_key", None)
        assert "Key" not in error["message"].replace("Bearer KEY", "").replace("API key", "")


@pytest.mark.parametrize("headers", [bearer("first-Key"), bearer("second-Key"), {"authorization": "bearer  first-Key"}])
async def test_accepted_keys(start: Start, headers: dict[str, str]) -> None:
    async with start(api_key=KEYS) as server:
        assert (await server.get("/v1/models", headers=headers)).status_code == 200


async def test_a_refused_request_costs_nothing(start: Start, engine: ScriptedEngine) -> None:
    async with start(api_key=KEYS) as server:
        body = {"messages": [{"role": "user", "content": "x" * 100_000}]}
        began = time.monotonic()
        assert (await server.post("/v1/chat/completions", body)).status_code == 401
        assert time.monotonic() - began < 1
        assert not engine.requests


async def test_without_keys_all_is_open(server: Loopback) -> None:
    assert (await server.get("/v1/models")).status_code == 200


async def test_public_metrics(start: Start) -> None:
    async with start(api_key=KEYS, public_metrics=True) as server:
        assert (await server.get("/metrics")).status_code == 200
        assert (await server.get("/v1/models")).status_code == 401


async def test_preflight_needs_no_key_and_errors_have_cors_headers(start: Start) -> None:
    origin = "https://example.org"
    async with start(api_key=KEYS, cors_origins=[origin]) as server:
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        response = await server.client.options("/v1/chat/completions", headers=preflight)
        assert response.headers["access-control-allow-origin"] == origin
        response = await server.get("/v1/models", headers={"Origin": origin})
        assert response.status_code == 401
        assert response.headers["access-control-allow-origin"] == origin
        # Without these a client in a browser repeats what it should not, or too soon.
        assert {"retry-after", "x-should-retry"} < {*response.headers["access-control-expose-headers"].split(", ")}
        response = await server.get("/v1/models", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in response.headers
