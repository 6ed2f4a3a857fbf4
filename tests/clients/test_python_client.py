"""The Python client against answers that no right server gives, and its protocol part by itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from reprise_client import APIError, AsyncClient, Client, ConnectionFailedError, Prompt, StreamBrokenError
from reprise_client.wire import StreamDecoder, root_url

Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler) -> Client:
    return Client(model="m", api_key="k", transport=httpx.MockTransport(handler))


def event(**fields: Any) -> str:
    choice = {"index": 0, "delta": {}, "finish_reason": None} | fields
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def streaming(text: str) -> Handler:
    def handler(_: httpx.Request) -> httpx.Response:
        headers = {"content-type": "text/event-stream", "x-request-id": "req-1"}
        return httpx.Response(200, text=text, headers=headers)

    return handler


def test_parameters_are_sent_as_they_are() -> None:
    seen: dict[str, Any] = {}

    def handler(request: httpx.Request) -> httpx.Response:
        seen.update(json.loads(request.content), path=request.url.path, key=request.headers["authorization"])
        return httpx.Response(400, json={"error": {"message": "no"}})

    with client(handler) as reprise, pytest.raises(APIError):
        reprise.chat("Hello", temperature=0, use_cache=False, stop=["\n"])
    assert seen == {
        "path": "/v1/chat/completions",
        "key": "Bearer k",
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0,
        "use_cache": False,
        "stop": ["\n"],
    }


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("Hello", "Hello"),
        ((1, 2), [1, 2]),
        (("a", "b"), ["a", "b"]),
        ([range(2), (7,)], [[0, 1], [7]]),
    ],
)
def test_a_prompt_is_text_token_ids_or_a_list_of_either(prompt: Prompt, sent: object) -> None:
    seen: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(400)

    async def ask_awaited() -> None:
        async with AsyncClient(model="m", transport=httpx.MockTransport(handler)) as reprise:
            await reprise.complete(prompt)

    with client(handler) as reprise, pytest.raises(APIError):
        reprise.complete(prompt)
    with pytest.raises(APIError):
        asyncio.run(ask_awaited())
    assert [body["prompt"] for body in seen] == [sent, sent]


def test_the_model_is_asked_for_once() -> None:
    paths: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "only"}]})
        assert json.loads(request.content)["model"] == "only"
        return httpx.Response(503, json={"error": {"message": "later"}}, headers={"retry-after": "3"})

    with Client(transport=httpx.MockTransport(handler)) as reprise:
        for _ in range(2):
            with pytest.raises(APIError) as caught:
                reprise.complete("x")
            assert caught.value.retry_after == 3
    assert paths == ["/v1/models", "/v1/completions", "/v1/completions"]


def test_an_error_has_everything_that_the_server_said() -> None:
    error = {"message": "too hot", "type": "invalid_request_error", "param": "temperature", "code": "too_hot"}

    def handler(_: httpx.Request) -> httpx.Response:
        return httpx.Response(400, json={"error": error}, headers={"x-request-id": "req-1"})

    with client(handler) as reprise, pytest.raises(APIError, match=r"^too hot \(request req-1\)$") as caught:
        reprise.stream_chat("x")
    raised = caught.value
    assert (raised.status, raised.error_type, raised.param, raised.code, raised.request_id, raised.retry_after) == (
        400, "invalid_request_error", "temperature", "too_hot", "req-1", None
    )  # fmt: skip


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": null}', b'{"error": "text"}'])
def test_an_error_of_any_shape_is_an_api_error(body: bytes) -> None:
    with client(lambda _: httpx.Response(502, content=body)) as reprise, pytest.raises(APIError) as caught:
        reprise.chat("x")
    assert caught.value.status == 502


def test_an_error_inside_of_a_stream() -> None:
    text = event(delta={"content": "a"}) + 'data: {"error": {"message": "lost", "code": "engine_lost"}}\n\n'
    with client(streaming(text)) as reprise, reprise.stream_chat("x") as stream:
        assert next(stream).text == "a"
        with pytest.raises(APIError, match="lost") as caught:
            next(stream)
    assert (caught.value.status, caught.value.code, caught.value.request_id) == (None, "engine_lost", "req-1")


def test_a_stream_that_is_cut_is_no_success() -> None:
    with (
        client(streaming(event(delta={"content": "a"}))) as reprise,
        reprise.stream_chat("x") as stream,
        pytest.raises(StreamBrokenError, match="req-1"),
    ):
        list(stream)


def test_a_cut_stream_awaited() -> None:
    async def scenario() -> None:
        transport = httpx.MockTransport(streaming(event(delta={"content": "a"})))
        async with (
            AsyncClient(model="m", transport=transport) as reprise,
            await reprise.stream_chat("x") as stream,
        ):
            assert (await anext(stream)).text == "a"
            with pytest.raises(StreamBrokenError):
                await anext(stream)

    asyncio.run(scenario())


def test_errors_of_the_transport_are_ours() -> None:
    def handler(_: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("slow")

    with client(handler) as reprise:
        with pytest.raises(ConnectionFailedError, match="slow"):
            reprise.chat("x")
        with pytest.raises(ConnectionFailedError, match="slow"):
            reprise.stream_chat("x")


def test_decoder_skips_comments_and_joins_lines_of_one_event() -> None:
    decoder = StreamDecoder(None)
    text = ': keep-alive\n\nevent: x\ndata: {"choices":\ndata:[{"index": 1, "text": "é", "finish_reason": "stop"}]}\n\n'
    (chunk,) = [chunk for byte in text.encode() for chunk in decoder.feed(bytes([byte]))]
    assert (chunk.index, chunk.text, chunk.finish_reason) == (1, "é", "stop")
    assert [*decoder.feed(b"data: [DONE]\r\n"), *decoder.feed(b"\r")] == []
    assert not decoder.done
    assert [*decoder.feed(b"\n")] == []
    assert decoder.done
    decoder.end()


def test_a_text_may_have_characters_that_python_takes_for_line_ends() -> None:
    text = "a\u2028b\u2029c\x85d"
    data = json.dumps(
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}, ensure_ascii=False
    )
    with (
        client(streaming(f"data: {data}\n\ndata: [DONE]\n\n")) as reprise,
        reprise.stream_chat("Hi") as stream,
    ):
        assert [chunk.text for chunk in stream] == [text]


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_address_may_end_in_v1(url: str) -> None:
    assert root_url(url) == "http://h:1"
