"""The Python client's streams over connections that break: against a live server, and against scripted answers."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx
import pytest

from benchmarks.local_server import LocalServer
from reprise_client import APIError, AsyncClient, Chunk, Client, ConnectionFailedError, StreamBrokenError, wire
from support.cutting_proxy import cutting

PARAMETERS: dict[str, Any] = {"max_tokens": 40, "seed": 5, "n": 2, "ignore_eos": True, "return_token_ids": True}
ANSWER_BYTES = 15_000
"""Below what one answer to PARAMETERS has."""


def told(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """What a reader of the chunks has in the end; what comes once did."""
    texts, ids, reasons = ["", ""], [[], []], [[], []]  # type: list[str], list[list[int]], list[list[str]]
    for chunk in chunks:
        texts[chunk.index] += chunk.text
        for choice in chunk.raw["choices"]:
            ids[chunk.index] += choice.get("token_ids", [])
        if chunk.finish_reason:
            reasons[chunk.index].append(chunk.finish_reason)
    usage = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    return {"texts": texts, "ids": ids, "reasons": reasons, "usage": usage, "id": len({c.raw["id"] for c in chunks})}


@pytest.mark.parametrize("retain_seconds", [0, 30])
def test_a_stream_over_connections_that_break(live_server: LocalServer, retain_seconds: int) -> None:
    """At random bytes: in heads, between events, within them. All at once, each as if nothing had happened."""
    rng = random.Random(retain_seconds)
    with Client(live_server.base_url, model="pocket") as client:
        expected = told(list(client.stream_complete("Hello", **PARAMETERS)))
    assert expected["usage"] == [80]
    num_cut = 0
    for _ in range(12):
        cuts = [rng.randrange(1, ANSWER_BYTES) for _ in range(3)]
        with (
            cutting(live_server.base_url, cuts) as proxy,
            Client(proxy.base_url, model="pocket") as client,
        ):
            assert told(read(client, retain_seconds)) == expected
            num_cut += proxy.num_cut
    assert num_cut > 12


def read(client: Client, retain_seconds: int) -> list[Chunk]:
    """All chunks; a first connection that breaks in its head is made by the caller."""
    while True:
        try:
            with client.stream_complete("Hello", **PARAMETERS, retain_seconds=retain_seconds) as stream:
                return list(stream)
        except ConnectionFailedError:
            continue


def test_the_same_awaited(live_server: LocalServer) -> None:
    asyncio.run(_awaited(live_server.base_url))


async def _awaited(base_url: str) -> None:
    client = AsyncClient(base_url, model="pocket")
    async with client, await client.stream_complete("Hello", **PARAMETERS) as stream:
        expected = told([chunk async for chunk in stream])
    with cutting(base_url, [3000, 2500, 4000]) as proxy:
        client = AsyncClient(proxy.base_url, model="pocket")
        async with client, await client.stream_complete("Hello", **PARAMETERS) as stream:
            assert told([chunk async for chunk in stream]) == expected
        assert proxy.num_cut == 3


def test_resuming_can_be_switched_off(live_server: LocalServer) -> None:
    with (
        cutting(live_server.base_url, [3000]) as proxy,
        Client(proxy.base_url, model="pocket", resumes=0) as client,
        client.stream_complete("Hello", **PARAMETERS) as stream,
        pytest.raises(ConnectionFailedError),
    ):
        list(stream)


Answer = str | httpx.Response | httpx.TransportError


def scripted(*answers: Answer, resumes: int = 5) -> tuple[Client, list[httpx.Request]]:
    """A client whose requests get these answers; a text is a stream that ends there."""
    seen: list[httpx.Request] = []
    left = list(answers)

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        return httpx.Response(200, text=answer, headers={"content-type": "text/event-stream"})

    return Client(model="m", transport=httpx.MockTransport(handler), resumes=resumes), seen


def event(text: str, event_id: str | None = None, *, end: str = "\n\n") -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return f"data: {json.dumps({'choices': [choice]})}" + (f"\nid: {event_id}" if event_id else "") + end


DONE = "data: [DONE]\n\n"


def text_of(client: Client) -> str:
    with client, client.stream_chat("Hi") as stream:
        return "".join(chunk.text for chunk in stream)


@pytest.fixture(autouse=True)
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    if monkeypatch is not None:
        monkeypatch.setattr("reprise_client.client.time.sleep", found.append)
    return found


def test_it_asks_for_what_follows_the_last_whole_event() -> None:
    """An event without its empty line is not whole, though its id is there."""
    client, seen = scripted(event("a", "1") + event("b", "2") + event("x", "3", end="\n"), event("c", "4") + DONE)
    assert text_of(client) == "abc"
    assert [request.headers.get("last-event-id") for request in seen] == [None, "2"]
    assert seen[0].content == seen[1].content


def test_a_stream_of_which_nothing_came_is_begun_again() -> None:
    client, seen = scripted(": keep-alive\n\n", event("a", "1") + DONE)
    assert text_of(client) == "a"
    assert "last-event-id" not in seen[1].headers


def test_a_server_without_ids_is_not_asked_again() -> None:
    client, seen = scripted(event("a"))
    with pytest.raises(StreamBrokenError):
        text_of(client)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "broken",
    [
        lambda: httpx.ConnectError("refused"),
        lambda: httpx.ReadTimeout("slow"),
        lambda: httpx.Response(503, json={"error": {"message": "loading", "code": "service_unavailable"}}),
        lambda: 'data: {"error": {"message": "bye", "code": "service_unavailable"}}\n\n' + DONE,
    ],
    ids=["refused", "silent", "loading", "draining"],
)
def test_what_may_pass_is_tried_again(broken: Callable[[], Answer], delays: list[float]) -> None:
    client, seen = scripted(event("a", "1"), broken(), broken(), event("b", "2") + DONE)
    assert text_of(client) == "ab"
    assert [request.headers.get("last-event-id") for request in seen] == [None, "1", "1", "1"]
    assert delays == [0.0, 0.1, 0.2]


def test_it_gives_up_after_as_many_attempts_as_it_is_told(delays: list[float]) -> None:
    bye = 'data: {"error": {"message": "bye", "code": "service_unavailable"}}\n\n'
    client, seen = scripted(event("a", "1"), *[bye] * 9, resumes=3)
    with pytest.raises(APIError, match="bye"):
        text_of(client)
    assert len(seen) == 4
    assert delays == [0.0, 0.1, 0.2]


def test_each_new_event_counts_anew() -> None:
    client, _ = scripted(*(event(str(number), f"{number}") for number in range(9)), DONE, resumes=1)
    assert text_of(client) == "012345678"


def test_a_refusal_is_raised(delays: list[float]) -> None:
    refusal = httpx.Response(409, json={"error": {"message": "other weights", "code": "cannot_resume"}})
    client, seen = scripted(event("a", "1"), refusal)
    with pytest.raises(APIError) as caught:
        text_of(client)
    assert (caught.value.status, caught.value.code) == (409, "cannot_resume")
    assert (len(seen), delays) == (2, [0.0])


class BreaksAtTheEnd(httpx.SyncByteStream, httpx.AsyncByteStream):
    """An answer that is complete, over a connection that is not ended as HTTP has it."""

    data = (event("a", "1") + DONE).encode()

    def __iter__(self) -> Iterator[bytes]:
        yield self.data
        raise httpx.RemoteProtocolError("incomplete chunked read")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.data
        raise httpx.RemoteProtocolError("incomplete chunked read")


def test_a_stream_that_is_complete_is_not_resumed() -> None:
    client, seen = scripted(httpx.Response(200, stream=BreaksAtTheEnd()))
    assert text_of(client) == "a"
    assert len(seen) == 1


def test_the_same_awaited_is_not_resumed() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, stream=BreaksAtTheEnd())

    async def read() -> str:
        client = AsyncClient(model="m", transport=httpx.MockTransport(handler))
        async with client, await client.stream_chat("Hi") as stream:
            return "".join([chunk.text async for chunk in stream])

    assert asyncio.run(read()) == "a"
    assert len(seen) == 1


def test_the_server_says_how_long_to_wait() -> None:
    decoder = wire.StreamDecoder(None)
    resumption = wire.Resumption(2, decoder)
    assert resumption.delay(APIError("later", status=429, retry_after=3.0)) == 3.0
    assert resumption.delay(APIError("later", status=429, retry_after=99.0)) == 5.0
    assert resumption.delay(APIError("later", status=429, retry_after=3.0)) is None


def test_a_stream_that_was_closed_stays_closed() -> None:
    client, seen = scripted(event("a", "1"), event("b", "2"))
    with client, client.stream_chat("Hi") as stream:
        next(stream)
        stream.close()
        with pytest.raises(Exception):  # noqa: B017, PT011 # whatever the transport says of a closed answer
            next(stream)
    assert len(seen) == 1


@pytest.mark.parametrize("when", ["waiting", "asking"])
def test_a_stream_that_is_closed_before_it_is_resumed_stays_closed(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client, seen = scripted(event("a", "1"), event("b", "2") + DONE)
    with client, client.stream_chat("Hi") as stream:
        if when == "waiting":
            monkeypatch.setattr("reprise_client.client.time.sleep", lambda _: stream.close())
        else:
            opening = stream._open

            def closed_meanwhile(headers: Mapping[str, str]) -> httpx.Response:
                stream.close()
                return opening(headers)

            monkeypatch.setattr(stream, "_open", closed_meanwhile)
        assert next(stream).text == "a"
        with pytest.raises(StreamBrokenError):
            next(stream)
    assert len(seen) == (1 if when == "waiting" else 2)


def test_the_same_awaited_stays_closed() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, text=event("a", "1"))

    async def read() -> None:
        client = AsyncClient(model="m", transport=httpx.MockTransport(handler))
        async with client, await client.stream_chat("Hi") as stream:
            waiting: list[asyncio.Task[Chunk]] = []
            assert (await anext(stream)).text == "a"
            while len(seen) < 2:
                waiting.append(asyncio.ensure_future(anext(aiter(stream))))
                assert (await waiting[-1]).text == "a"
            waiting.append(asyncio.ensure_future(anext(aiter(stream))))
            await asyncio.sleep(0)
            await stream.close()
            with pytest.raises(StreamBrokenError):
                await waiting[-1]

    asyncio.run(read())
    assert len(seen) == 2


def test_it_tries_for_as_long_as_a_server_takes_to_start_again() -> None:
    resumption = wire.Resumption(wire.DEFAULT_RESUMES, wire.StreamDecoder(None))
    delays = []
    while (delay := resumption.delay(ConnectionFailedError("refused"))) is not None:
        delays.append(delay)
    assert delays[:4] == [0.0, 0.1, 0.2, 0.4]
    assert 25 < sum(delays) < 40
