"""`Last-Event-ID` over a real socket: a held generation is read on, any other is computed again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from transformers.utils import chat_template_utils

from reprise.api import retention
from reprise.errors import GenerationError
from reprise.settings import Settings
from reprise.text.tokenizer import Tokenizer
from reprise.types import ChoiceDelta
from support.live_api import Answer, of_events
from support.loopback import Loopback, Start, events_with_ids, eventually, serving
from support.scripted_engine import READY, ScriptedEngine, answer_deltas
from support.tiny_tokenizers import add_start_token, byte_level, save_model

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, HELLO),
    (CHAT, HELLO | {"n": 2, "logprobs": True, "return_token_ids": True, "stream_options": {"include_usage": True}}),
    (COMPLETIONS, {"prompt": "Hello", "stream": True, "seed": -3}),
    (
        COMPLETIONS,
        {"prompt": ["a", "b"], "n": 2, "logprobs": 1, "echo": True, "stream": True, "max_tokens": 7}
        | {"stream_options": {"include_usage": True}},
    ),
]

Events = Sequence[tuple[Any, str | None]]


async def resume(server: Loopback, path: str, body: dict[str, Any], last: str | None, **headers: str) -> httpx.Response:
    return await server.post(path, body, headers={"last-event-id": last or "", **headers})


async def events_after(server: Loopback, path: str, body: dict[str, Any], last: str | None) -> Events:
    response = await resume(server, path, body, last)
    assert response.status_code == 200, response.text
    return events_with_ids(response.text)


def folded(*parts: Events) -> Answer:
    return of_events([event for part in parts for event, _ in part])


async def whole_of(server: Loopback, path: str, body: dict[str, Any]) -> Events:
    return events_with_ids((await server.post(path, body)).text)


def counters(text: str) -> dict[str, float]:
    lines = [line.split() for line in text.splitlines() if line.startswith("reprise_") and "{" not in line]
    return {name.removeprefix("reprise_"): float(value) for name, value in lines}


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("retain", [0, 60])
async def test_a_stream_cut_after_any_event(server: Loopback, path: str, body: dict[str, Any], retain: int) -> None:
    body = body | {"retain_seconds": retain}
    whole = await whole_of(server, path, body)
    expected = folded(whole)
    assert [event_id is None for _, event_id in whole] == [False] * (len(whole) - 1) + [True]
    for cut in range(1, len(whole)):
        rest = await events_after(server, path, body, whole[cut - 1][1])
        assert folded(whole[:cut], rest) == expected
    engine: Any = server.app.state.service.engine
    num_prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    assert len(engine.requests) == num_prompts * (1 if retain else len(whole))


async def test_a_resumed_stream_is_the_same_response(server: Loopback, engine: ScriptedEngine) -> None:
    """Though the request names no seed, and by now another one would be chosen."""
    whole = await whole_of(server, CHAT, HELLO)
    rest = await events_after(server, CHAT, HELLO, whole[2][1])
    first, second = whole[0][0], rest[0][0]
    for name in ("id", "created", "model", "system_fingerprint"):
        assert first[name] == second[name]
    assert first["reprise"]["seed"] == engine.requests[0].sampling.seed == engine.requests[1].sampling.seed
    assert engine.requests[0].request_id == engine.requests[1].request_id
    assert [event_id for _, event_id in rest][-2] == whole[-2][1]


async def test_a_stream_goes_on_with_its_own_prompt_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that asks for the time makes another prompt of the same request later."""
    tokenizer = Tokenizer.load(
        str(save_model(tmp_path, add_start_token(byte_level()))),
        chat_template="{{ strftime_now('%d %B') }}: {{ messages[0].content }}",
    )
    clock = SimpleNamespace(now=lambda: datetime(2023, 11, 14, 23, 59, tzinfo=UTC))
    monkeypatch.setattr(chat_template_utils, "datetime", clock)
    engine = ScriptedEngine(tokenizer)
    async with serving(Settings(served_model_name=["test/model"]), tokenizer, engine) as server:
        whole = await whole_of(server, CHAT, HELLO)
        assert folded(whole[:2], await events_after(server, CHAT, HELLO, whole[1][1])) == folded(whole)
        clock.now = lambda: datetime(2023, 11, 15, tzinfo=UTC)
        refused = await resume(server, CHAT, HELLO, whole[1][1])
        assert server.app.state.service.admission.num_reserved == 0
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "cannot_resume")
    assert "other tokens now" in refused.json()["error"]["message"]
    prompts = [tokenizer.decode(one.prompt_token_ids, skip_special_tokens=True) for one in engine.requests]
    assert prompts == ["14 November: Hello"] * 2


async def test_a_cut_where_the_second_time_all_comes_at_once(server: Loopback, engine: ScriptedEngine) -> None:
    """What is merged then goes over no cut."""
    deltas = script(engine, "Hello, world!")
    engine.enqueue(deltas)
    whole = await whole_of(server, CHAT, HELLO)
    for cut in range(1, len(whole)):
        engine.enqueue([deltas])
        rest = await events_after(server, CHAT, HELLO, whole[cut - 1][1])
        assert folded(whole[:cut], rest) == folded(whole)


async def test_nothing_is_left(server: Loopback) -> None:
    whole = await whole_of(server, CHAT, HELLO)
    assert await events_after(server, CHAT, HELLO, whole[-2][1]) == [("[DONE]", None)]


async def test_a_running_generation_is_read_on(server: Loopback, engine: ScriptedEngine) -> None:
    """It ran while nobody was there, and has its place in the engine until it ends."""
    go_on, deltas = asyncio.Event(), script(engine, "Hello, world!")
    engine.enqueue([*deltas[:4], go_on, *deltas[4:]])
    body = HELLO | {"retain_seconds": 30}
    before = await read_until(server, body, num_events=4)
    service = server.app.state.service
    await eventually(lambda: service.generations.num_kept == 1)
    assert not engine.streams[0].closed
    assert service.admission.num_reserved == 1
    assert counters((await server.get("/metrics")).text)["kept_generations"] == 1
    go_on.set()
    await eventually(lambda: engine.streams[0].finished)
    await eventually(lambda: service.admission.num_reserved == 0)
    rest = await events_after(server, CHAT, body, before[-1][1])
    assert folded(before, rest).text == "Hello, world!"
    assert len(engine.requests) == 1
    found = counters((await server.get("/metrics")).text)
    assert (found["attached_streams_total"], found["recomputed_streams_total"]) == (1, 0)


async def test_a_generation_that_nobody_comes_back_for_is_aborted(server: Loopback, engine: ScriptedEngine) -> None:
    engine.enqueue([*script(engine, "Hello")[:3], asyncio.Event()])
    before = await read_until(server, HELLO | {"retain_seconds": 0.2}, num_events=3)
    service = server.app.state.service
    await eventually(lambda: service.generations.num_kept == 1)
    assert not engine.streams[0].closed
    await eventually(lambda: engine.streams[0].closed)
    assert (service.generations.num_kept, service.admission.num_reserved) == (0, 0)
    engine.answer = "Hello"
    rest = await events_after(server, CHAT, HELLO, before[-1][1])
    assert folded(before, rest).text == "Hello"
    assert counters((await server.get("/metrics")).text)["recomputed_streams_total"] == 1


async def test_what_is_read_and_too_long_to_be_kept_is_computed_again(
    start: Start, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own client reads it to its end."""
    monkeypatch.setattr(retention, "LOOK_INTERVAL", 0.005)
    go_on, deltas = asyncio.Event(), script(engine, "Hello, world!")
    engine.enqueue([*deltas[:4], go_on, *deltas[4:]])
    async with start(max_retained_tokens=0) as server:
        body, service = HELLO | {"retain_seconds": 30}, server.app.state.service
        async with server.client.stream("POST", CHAT, json=body) as response:
            pieces, text = response.aiter_text(), ""
            while text.count("\n\n") < 4:
                text += await anext(pieces)
            await eventually(lambda: not engine.streams[0].complete)
            before = events_with_ids(text)
            rest = await events_after(server, CHAT, body, before[2][1])
            assert folded(before[:3], rest).text == "Hello, world!"
            assert (service.generations.num_attached, service.generations.num_recomputed) == (0, 1)
            go_on.set()
            text += "".join([piece async for piece in pieces])
        assert folded(events_with_ids(text)).text == "Hello, world!"
        await eventually(lambda: service.admission.num_reserved == 0)


async def test_two_may_read_on_at_once(server: Loopback) -> None:
    body = HELLO | {"retain_seconds": 30}
    whole = await whole_of(server, CHAT, body)
    rests = await asyncio.gather(*(events_after(server, CHAT, body, whole[cut][1]) for cut in (1, 3, 5)))
    for cut, rest in zip((1, 3, 5), rests, strict=True):
        assert folded(whole[: cut + 1], rest) == folded(whole)


async def test_no_more_may_read_at_once_than_is_bounded(server: Loopback, engine: ScriptedEngine) -> None:
    engine.enqueue([*script(engine, "Hello")[:3], asyncio.Event()])
    body = HELLO | {"retain_seconds": 30}
    before = await read_until(server, body, num_events=2)
    pending = [asyncio.create_task(resume(server, CHAT, body, before[-1][1])) for _ in range(16)]
    [generation] = await held(server, num_readers=16)
    assert (await resume(server, CHAT, body, before[-1][1])).status_code == 429
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    await eventually(lambda: not generation.readers)


async def held(server: Loopback, *, num_readers: int) -> list[Any]:
    generations = server.app.state.service.generations
    await eventually(lambda: [len(one.readers) for one in generations.read_now] == [num_readers])
    return list(generations.read_now)


async def test_another_key_does_not_find_a_held_generation(start: Start, engine: ScriptedEngine) -> None:
    """It gets the same answer, as it knows the request: by a computation of its own."""
    async with start(api_key=["one", "two"]) as server:
        body = HELLO | {"retain_seconds": 30}
        mine, others = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        whole = events_with_ids((await server.post(CHAT, body, headers=mine)).text)
        for headers, num_requests in ((mine, 1), (others, 2)):
            response = await resume(server, CHAT, body, whole[1][1], **headers)
            assert folded(whole[:2], events_with_ids(response.text)) == folded(whole)
            assert len(engine.requests) == num_requests


async def test_a_failed_generation_is_computed_again(server: Loopback, engine: ScriptedEngine) -> None:
    deltas = script(engine, "Hello, world!")
    engine.enqueue([*deltas[:3], GenerationError("lost", code="internal_error")])
    body = HELLO | {"retain_seconds": 30}
    broken = await whole_of(server, CHAT, body)
    assert broken[-2][0]["error"]["code"] == "internal_error"
    assert broken[-2][1] is None
    last = broken[-3][1]
    rest = await events_after(server, CHAT, body, last)
    assert folded(broken[:-2], rest).text == "Hello, world!"


async def test_a_server_that_promises_nothing_reads_on_and_does_not_compute_again(
    server: Loopback, engine: ScriptedEngine
) -> None:
    engine.info = msgspec.structs.replace(READY, deterministic=False)
    kept, gone = HELLO | {"retain_seconds": 30}, HELLO
    whole = await whole_of(server, CHAT, kept)
    assert whole[0][0]["reprise"]["deterministic"] is False
    assert folded(whole[:3], await events_after(server, CHAT, kept, whole[2][1])) == folded(whole)
    last = (await whole_of(server, CHAT, gone))[2][1]
    refused = await resume(server, CHAT, gone, last)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "cannot_resume")
    assert refused.json()["error"]["param"] == "Last-Event-ID"
    assert "twice" in refused.json()["error"]["message"]
    assert refused.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("change", [{"weights_fingerprint": "other"}, {"numerics_fingerprint": "other"}], ids=str)
async def test_another_arithmetic_does_not_go_on(server: Loopback, engine: ScriptedEngine, change: Any) -> None:
    last = (await whole_of(server, CHAT, HELLO))[2][1]
    engine.info = msgspec.structs.replace(READY, **change)
    refused = await resume(server, CHAT, HELLO, last)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "cannot_resume")
    assert "fingerprint" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "change",
    [{"seed": 5}, {"temperature": 0.5}, {"n": 2}, {"messages": [{"role": "user", "content": "Bye"}]}, {"stop": "x"}],
    ids=str,
)
async def test_another_request_does_not_go_on(server: Loopback, change: dict[str, Any]) -> None:
    last = (await whole_of(server, CHAT, HELLO))[2][1]
    assert_refused(await resume(server, CHAT, HELLO | change, last))


async def test_the_other_endpoint_does_not_go_on(server: Loopback) -> None:
    last = (await whole_of(server, COMPLETIONS, {"prompt": "a", "stream": True}))[2][1]
    assert_refused(await resume(server, CHAT, HELLO, last))


@pytest.mark.parametrize("last", ["", "7", "1.a.b.c", "x" * 4000])
async def test_an_id_that_is_none(server: Loopback, engine: ScriptedEngine, last: str) -> None:
    assert_refused(await resume(server, CHAT, HELLO, last))
    assert not engine.requests


async def test_a_resumed_response_is_a_stream(server: Loopback) -> None:
    last = (await whole_of(server, CHAT, HELLO))[2][1]
    assert_refused(await resume(server, CHAT, HELLO | {"stream": False}, last))


async def test_how_it_is_sent_may_change(server: Loopback) -> None:
    """The sums may be asked for later."""
    whole = await whole_of(server, CHAT, HELLO)
    body = HELLO | {"stream_options": {"include_usage": True}, "retain_seconds": 1}
    rest = await events_after(server, CHAT, body, whole[2][1])
    assert rest[-2][0]["usage"]["completion_tokens"] == 13


async def test_more_may_not_be_kept_than_is_allowed(start: Start) -> None:
    async with start(max_retain_seconds=5) as server:
        assert (await server.post(CHAT, HELLO | {"retain_seconds": 5})).status_code == 200
        for seconds in (5.1, -1, "5"):
            refused = await server.post(CHAT, HELLO | {"retain_seconds": seconds})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "retain_seconds")


@pytest.mark.parametrize(
    ("fields", "key", "ignored"),
    [
        ({"stream": False, "retain_seconds": 5}, {}, ["retain_seconds"]),
        ({"stream": False, "retain_seconds": 0}, {}, []),
        ({"stream": False, "retain_seconds": 5}, {"idempotency-key": "k"}, []),
        ({"stream": True, "retain_seconds": 5}, {}, []),
    ],
    ids=str,
)
async def test_that_nobody_can_read_it_again_is_said(
    server: Loopback, fields: dict[str, Any], key: dict[str, str], ignored: list[str]
) -> None:
    """The rest of a stream, or a second request with the key: there is no third way."""
    response = await server.post(CHAT, HELLO | fields, headers=key)
    body = events_with_ids(response.text)[0][0] if fields["stream"] else response.json()
    assert body["reprise"]["ignored_parameters"] == ignored
    assert response.headers.get("x-reprise-ignored-parameters", "") == "".join(ignored)


async def test_what_nobody_can_read_again_ends_when_its_client_leaves(server: Loopback, engine: ScriptedEngine) -> None:
    engine.enqueue(None)
    with pytest.raises(httpx.ReadTimeout):
        await server.client.post(CHAT, json=HELLO | {"stream": False, "retain_seconds": 30}, timeout=0.2)
    await eventually(lambda: engine.streams[0].closed)


async def test_a_held_stream_is_read_on_where_there_is_no_room(start: Start, engine: ScriptedEngine) -> None:
    async with start(max_num_seqs=1, max_waiting_seqs=0) as server:
        go_on, deltas = asyncio.Event(), script(engine, "Hello, world!")
        engine.enqueue([*deltas[:4], go_on, *deltas[4:]])
        body = HELLO | {"retain_seconds": 30}
        before = await read_until(server, body, num_events=4)
        assert (await server.post(CHAT, HELLO)).status_code == 429
        reading = asyncio.create_task(events_after(server, CHAT, body, before[-1][1]))
        await held(server, num_readers=1)
        go_on.set()
        assert folded(before, await reading).text == "Hello, world!"


async def test_a_shutdown_ends_what_nobody_reads(start: Start, engine: ScriptedEngine) -> None:
    async with start(drain_timeout=20) as server:
        engine.enqueue([*script(engine, "Hello")[:3], asyncio.Event()])
        await read_until(server, HELLO | {"retain_seconds": 30}, num_events=3)
        await eventually(lambda: server.app.state.service.generations.num_kept == 1)
        server.server.request_shutdown()
        await eventually(lambda: engine.streams[0].closed, seconds=5)
    assert server.exit_code == 0


async def test_keep_alives_from_the_start(start: Start, engine: ScriptedEngine) -> None:
    async with start(keep_alive_interval=0.05) as server:
        whole = await whole_of(server, CHAT, HELLO)
        go_on = asyncio.Event()
        engine.enqueue([go_on, *script(engine, "Hello, world!")])
        asyncio.get_running_loop().call_later(0.2, go_on.set)
        response = await resume(server, CHAT, HELLO, whole[2][1])
        assert response.text.startswith(": keep-alive\n\n")
        assert folded(whole[:3], events_with_ids(response.text)) == folded(whole)


def assert_refused(response: httpx.Response) -> None:
    assert (response.status_code, response.json()["error"]["param"]) == (400, "Last-Event-ID"), response.text


def script(engine: ScriptedEngine, text: str) -> list[ChoiceDelta]:
    """The deltas of an answer, a token each."""
    from reprise.types import GenerationRequest, SamplingParams

    sampling = SamplingParams(seed=0, max_tokens=100, end_token_ids=(2,))
    request = GenerationRequest(request_id="r", prompt_token_ids=[1], sampling=sampling)
    return answer_deltas(engine.tokenizer, text, request)


async def read_until(server: Loopback, body: dict[str, Any], *, num_events: int) -> Events:
    """So many events of a stream, whose connection is then cut."""
    seen = ""
    async with server.client.stream("POST", CHAT, json=body) as response:
        async for text in response.aiter_text():
            seen += text
            if seen.count("\n\n") >= num_events:
                break
    return events_with_ids(seen[: seen.rindex("\n\n") + 2])[:num_events]
