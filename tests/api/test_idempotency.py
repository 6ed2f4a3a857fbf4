"""`Idempotency-Key` over a real socket: a request that is sent twice is answered twice and generated once."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest

from reprise.api import chat, retention
from reprise.errors import GenerationError
from reprise.types import ChoiceDelta, FinishReason
from support.live_api import Answer, of_events, of_response
from support.loopback import Loopback, Start, events, eventually
from support.scripted_engine import Item, ScriptedEngine

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
REPLAYED = "idempotent-replayed"


async def post(server: Loopback, body: dict[str, Any], key: str, path: str = CHAT, **headers: str) -> httpx.Response:
    return await server.post(path, body, headers={"idempotency-key": key, **headers})


def answer_of(response: httpx.Response) -> tuple[str, int, Answer]:
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        found = events(response.text)
        return found[0]["id"], found[0]["created"], of_events(found)
    body = response.json()
    return body["id"], body["created"], of_response(body)


@pytest.mark.parametrize("first", [{}, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("second", [{}, STREAM], ids=["whole", "stream"])
async def test_a_repeated_request_has_the_same_response(
    server: Loopback, engine: ScriptedEngine, first: dict[str, Any], second: dict[str, Any]
) -> None:
    """The seed is the server's own choice, so a second generation would show."""
    one = await post(server, HELLO | first, "k")
    two = await post(server, HELLO | second, "k")
    assert answer_of(one) == answer_of(two)
    assert (one.headers.get(REPLAYED), two.headers.get(REPLAYED)) == (None, "true")
    assert one.headers["x-reprise-seed"] == two.headers["x-reprise-seed"]
    assert len(engine.requests) == 1
    assert "reprise_joined_requests_total 1.0" in (await server.get("/metrics")).text


async def test_a_running_generation_is_joined(start: Start, engine: ScriptedEngine) -> None:
    """By as many as like, at once, in a server that has no room for another one."""
    async with start(max_num_seqs=1, max_waiting_seqs=0) as server:
        go_on = asyncio.Event()
        script: list[Item] = [ChoiceDelta(index=0, text="a", token_ids=[5]), go_on]
        engine.enqueue([*script, ChoiceDelta(index=0, text="b", token_ids=[6], finish_reason=FinishReason.STOP)])
        asking = [asyncio.create_task(post(server, HELLO | how, "k")) for how in (STREAM, {}, STREAM, {})]
        generations = server.app.state.service.generations
        await eventually(lambda: sum(len(one.readers) for one in generations.read_now) == 4)
        assert server.app.state.service.admission.num_reserved == 1
        assert (await server.post(CHAT, HELLO)).status_code == 429
        go_on.set()
        found = [answer_of(await one) for one in asking]
    assert [answer.text for _, _, answer in found] == ["ab"] * 4
    assert found[1:] == found[:1] * 3
    assert len(engine.requests) == 1


async def test_the_second_waits_while_the_first_is_tokenised(
    server: Loopback, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_tokenise, to_generation = threading.Event(), chat.to_generation
    calls = []

    def slow(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        assert may_tokenise.wait(10)
        return to_generation(*args, **kwargs)

    from reprise.api import generation_routes

    endpoint = generation_routes.CHAT
    monkeypatch.setattr(generation_routes, "CHAT", type(endpoint)(**(vars(endpoint) | {"to_generation": slow})))
    asking = [asyncio.create_task(post(server, HELLO, "k")) for _ in range(3)]
    await eventually(lambda: calls)
    await asyncio.sleep(0.1)
    assert not engine.requests
    may_tokenise.set()
    answers = [answer_of(await one) for one in asking]
    assert answers[1:] == answers[:1] * 2
    assert (len(calls), len(engine.requests)) == (1, 1)


async def test_a_first_one_that_is_refused_leaves_the_place_to_the_next(server: Loopback) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 2000}]}
    refused = await asyncio.gather(*(post(server, long, "k") for _ in range(3)))
    assert [one.status_code for one in refused] == [400] * 3
    assert (await post(server, HELLO, "k")).headers.get(REPLAYED) is None


async def test_a_client_that_left_comes_back(server: Loopback, engine: ScriptedEngine) -> None:
    go_on = asyncio.Event()
    engine.enqueue([go_on, ChoiceDelta(index=0, text="late", token_ids=[5], finish_reason=FinishReason.STOP)])
    with pytest.raises(httpx.ReadTimeout):
        await server.client.post(CHAT, json=HELLO, headers={"idempotency-key": "k"}, timeout=0.2)
    await eventually(lambda: server.app.state.service.generations.num_kept == 1)
    assert not engine.streams[0].closed
    go_on.set()
    again = await post(server, HELLO, "k")
    assert (answer_of(again)[2].text, again.headers[REPLAYED]) == ("late", "true")


async def test_a_response_is_kept_for_the_time_of_the_setting(start: Start, engine: ScriptedEngine) -> None:
    async with start(idempotency_seconds=0.2) as server:
        one = answer_of(await post(server, HELLO, "k"))
        assert answer_of(await post(server, HELLO, "k")) == one
        await eventually(lambda: server.app.state.service.generations.num_kept == 0)
        assert answer_of(await post(server, HELLO, "k"))[0] != one[0]
    assert len(engine.requests) == 2


async def test_with_no_time_to_keep_a_running_one_is_still_joined(start: Start, engine: ScriptedEngine) -> None:
    async with start(idempotency_seconds=0) as server:
        go_on = asyncio.Event()
        engine.enqueue([go_on, ChoiceDelta(index=0, text="a", token_ids=[5], finish_reason=FinishReason.STOP)])
        asking = [asyncio.create_task(post(server, HELLO, "k")) for _ in range(2)]
        generations = server.app.state.service.generations
        await eventually(lambda: sum(len(one.readers) for one in generations.read_now) == 2)
        go_on.set()
        answers = [answer_of(await one) for one in asking]
        assert answers[0] == answers[1]
        assert generations.num_kept == 0
        assert answer_of(await post(server, HELLO, "k"))[0] != answers[0][0]


async def test_one_that_there_is_no_room_to_keep_is_generated_again(
    start: Start, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "LOOK_INTERVAL", 0.005)
    async with start(max_retained_tokens=0) as server:
        go_on = asyncio.Event()
        engine.enqueue([go_on, ChoiceDelta(index=0, text="a", token_ids=[5], finish_reason=FinishReason.STOP)])
        first = asyncio.create_task(post(server, HELLO, "k"))
        await eventually(lambda: engine.streams and not engine.streams[0].retained)
        second = await post(server, HELLO, "k")
        go_on.set()
        assert (answer_of(await first)[2].text, answer_of(second)[2].text) == ("a", "Hello, world!")
        assert second.headers.get(REPLAYED) is None


async def test_a_failed_generation_is_not_repeated(server: Loopback, engine: ScriptedEngine) -> None:
    engine.enqueue([ChoiceDelta(index=0, text="a", token_ids=[5]), GenerationError("lost", code="internal_error")])
    assert (await post(server, HELLO, "k")).status_code == 500
    again = await post(server, HELLO, "k")
    assert (answer_of(again)[2].text, again.headers.get(REPLAYED)) == ("Hello, world!", None)


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_tokens": 3}, {"messages": []}, {"user": "u"}], ids=str)
async def test_a_key_is_for_one_request(server: Loopback, change: dict[str, Any]) -> None:
    await post(server, HELLO, "k")
    refused = await post(server, HELLO | change, "k")
    if change == {"messages": []}:
        assert refused.status_code == 400
    else:
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_key_reused")
        assert refused.json()["error"]["param"] == "Idempotency-Key"


async def test_a_key_is_the_endpoints_own(server: Loopback, engine: ScriptedEngine) -> None:
    await post(server, HELLO, "k")
    other = await post(server, {"prompt": "Hello"}, "k", path=COMPLETIONS)
    assert (other.status_code, other.headers.get(REPLAYED)) == (200, None)
    assert len(engine.requests) == 2


async def test_a_key_is_the_clients_own(start: Start, engine: ScriptedEngine) -> None:
    async with start(api_key=["one", "two"]) as server:
        found = [(await post(server, HELLO, "k", authorization=f"Bearer {who}")) for who in ("one", "two", "one")]
    assert [one.headers.get(REPLAYED) for one in found] == [None, None, "true"]
    assert answer_of(found[0]) == answer_of(found[2]) != answer_of(found[1])
    assert len(engine.requests) == 2


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "\xfc"])
async def test_a_key_that_is_none(server: Loopback, engine: ScriptedEngine, key: str) -> None:
    headers = {"idempotency-key": key.encode("latin-1")}
    refused = await server.post(CHAT, HELLO, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")
    assert not engine.requests


async def test_a_key_that_is_sent_twice(server: Loopback) -> None:
    refused = await server.post(CHAT, HELLO, headers=[("idempotency-key", "a"), ("idempotency-key", "b")])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")


async def test_a_repeated_stream_can_be_resumed(server: Loopback, engine: ScriptedEngine) -> None:
    from support.loopback import events_with_ids

    await post(server, HELLO, "k")
    whole = events_with_ids((await post(server, HELLO | STREAM, "k")).text)
    rest = await post(server, HELLO | STREAM, "k", **{"last-event-id": str(whole[4][1])})
    together = [event for event, _ in whole[:5] + events_with_ids(rest.text)]
    assert of_events(together) == of_events([event for event, _ in whole])
    assert len(engine.requests) == 1
