from __future__ import annotations

import asyncio
from typing import Any

import pytest

from reprise.api.request_context import CLIENT_CLOSED_REQUEST, RequestContext
from support.loopback import Loopback
from support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio


async def test_every_answer_has_its_headers(server: Loopback) -> None:
    for path in ("/health", "/v1/models", "/nothing"):
        response = await server.get(path)
        assert response.headers["x-request-id"].startswith("req_")
        assert int(response.headers["openai-processing-ms"]) >= 0
        assert response.headers["openai-version"] == "2020-10-01"
    first, second = [(await server.get("/health")).headers["x-request-id"] for _ in range(2)]
    assert first != second


async def test_a_clients_own_id_is_used(server: Loopback) -> None:
    response = await server.get("/health", headers={"x-request-id": "my-id:7/a"})
    assert response.headers["x-request-id"] == "my-id:7/a"


@pytest.mark.parametrize("value", ["", "a b", "x" * 129, 'a"b', "a;b", "ä".encode()])
async def test_an_id_that_might_harm_is_replaced(server: Loopback, value: Any) -> None:
    response = await server.get("/health", headers={"x-request-id": value})
    assert response.headers["x-request-id"].startswith("req_")


async def test_a_failed_request_is_named_in_its_error(server: Loopback, engine: ScriptedEngine) -> None:
    engine.enqueue([RuntimeError("boom")])
    response = await server.post("/v1/completions", {"prompt": "a"}, headers={"x-request-id": "abc"})
    assert response.status_code == 500
    assert "abc" in response.json()["error"]["message"]
    assert "boom" not in response.text


class Observed(list[tuple[str, int]]):
    def __call__(self, route: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.append((route, status))


async def drive(app: Any, observed: Observed) -> list[Any]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    await RequestContext(app, observe=observed)(scope, receive, send)
    return sent


async def test_cleanup_happens_once_however_a_request_ends() -> None:
    ended: list[str] = []

    def app(ending: str) -> Any:
        async def call(scope: Any, _: Any, send: Any) -> None:
            scope["state"]["cleanup"].callback(ended.append, ending)
            if ending == "raises":
                raise RuntimeError
            await send({"type": "http.response.start", "status": 200, "headers": []})
            if ending == "raises late":
                raise RuntimeError
            await send({"type": "http.response.body", "body": b""})

        return call

    observed = Observed()
    for ending in ("returns", "raises", "raises late"):
        await drive(app(ending), observed)
    assert ended == ["returns", "raises", "raises late"]
    assert observed == [("unmatched", 200), ("unmatched", 500), ("unmatched", 500)]


async def test_cleanup_happens_when_the_task_is_cancelled() -> None:
    ended = asyncio.Event()

    async def app(scope: Any, _: Any, __: Any) -> None:
        scope["state"]["cleanup"].callback(ended.set)
        await asyncio.Event().wait()

    observed = Observed()
    task = asyncio.create_task(drive(app, observed))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    assert observed == [("unmatched", CLIENT_CLOSED_REQUEST)]


async def test_an_answer_that_breaks_off_is_not_completed() -> None:
    """A client must be able to see that something is missing."""

    async def app(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError

    sent = await drive(app, Observed())
    assert [message["type"] for message in sent] == ["http.response.start"]
