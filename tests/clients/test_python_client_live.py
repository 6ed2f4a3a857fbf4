"""The Python client against a live server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from benchmarks.local_server import LocalServer, free_port
from reprise_client import APIError, AsyncClient, Client, ConnectionFailedError

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(live_base_url: str) -> Iterator[Client]:
    with Client(live_base_url) as client:
        yield client


def test_models(client: Client) -> None:
    assert client.models() == ["pocket"]


def test_chat(client: Client) -> None:
    completion = client.chat(MESSAGES, temperature=0)
    assert "Paris" in completion.text
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.completion_tokens > 1
    assert completion.id.startswith("chatcmpl-")
    assert completion.request_id
    assert completion.model == "pocket"


def test_stream_is_the_same_text_in_pieces(client: Client) -> None:
    # So long that no reader is late for all of it: what it is late for comes as one piece.
    settings = {"seed": 11, "max_tokens": 300, "ignore_eos": True}
    whole = client.chat(MESSAGES, **settings)
    with client.stream_chat(MESSAGES, **settings) as stream:
        chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert len([chunk for chunk in chunks if chunk.text]) > 1
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert stream.request_id


def test_completion_of_text_and_of_token_ids(client: Client) -> None:
    whole = client.complete("Hello", max_tokens=5, n=2, seed=3, ignore_eos=True)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage.completion_tokens == 10
    assert client.complete([1, 2, 3], max_tokens=3, ignore_eos=True).usage.prompt_tokens == 3


def test_several_prompts_at_once_are_answered_in_their_order(client: Client) -> None:
    single = [client.complete(text, max_tokens=4, temperature=0, ignore_eos=True).text for text in ("Hello", "Paris")]
    together = client.complete(["Hello", "Paris"], max_tokens=4, temperature=0, ignore_eos=True)
    assert [choice.text for choice in together.choices] == single


def test_a_stream_of_two_choices(client: Client) -> None:
    whole = client.complete("Hello", max_tokens=8, n=2, seed=3)
    with client.stream_complete("Hello", max_tokens=8, n=2, seed=3) as stream:
        texts = ["", ""]
        for chunk in stream:
            texts[chunk.index] += chunk.text
    assert texts == [choice.text for choice in whole.choices]


def test_a_stream_can_be_left_early(client: Client) -> None:
    with client.stream_complete("Hello", max_tokens=1000, ignore_eos=True) as stream:
        next(stream)
    assert client.chat("Hello!", max_tokens=1).usage.completion_tokens == 1


def test_errors_say_what_and_which_request(client: Client) -> None:
    with pytest.raises(APIError) as caught:
        client.chat(MESSAGES, temperature=-1)
    assert caught.value.status == 400
    assert caught.value.param == "temperature"
    assert caught.value.request_id
    with pytest.raises(APIError) as caught:
        client.stream_chat(MESSAGES, temperature=-1)
    assert caught.value.param == "temperature"


def test_an_unknown_model(live_base_url: str) -> None:
    with Client(live_base_url, model="nobody") as client, pytest.raises(APIError) as caught:
        client.chat(MESSAGES)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_nobody_listens() -> None:
    with (
        Client(f"http://127.0.0.1:{free_port()}", model="x") as client,
        pytest.raises(ConnectionFailedError, match="no answer"),
    ):
        client.chat(MESSAGES)


def test_everything_is_there_awaited(live_server: LocalServer) -> None:
    asyncio.run(_everything(live_server.base_url))


async def _everything(base_url: str) -> None:
    async with AsyncClient(base_url + "/v1") as client:
        assert await client.models() == ["pocket"]
        whole = await client.chat(MESSAGES, seed=11)
        async with await client.stream_chat(MESSAGES, seed=11) as stream:
            assert "".join([chunk.text async for chunk in stream]) == whole.text
        assert (await client.complete("Hello", max_tokens=3, ignore_eos=True)).usage.completion_tokens == 3
        with pytest.raises(APIError) as caught:
            await client.chat(MESSAGES, top_p=2)
        assert caught.value.param == "top_p"


def test_many_streams_at_once(live_base_url: str) -> None:
    asyncio.run(_many_streams(live_base_url))


async def _many_streams(base_url: str) -> None:
    async with AsyncClient(base_url, model="pocket") as client:

        async def text(seed: int) -> str:
            async with await client.stream_complete("Hello", max_tokens=12, seed=seed) as stream:
                return "".join([chunk.text async for chunk in stream])

        together = await asyncio.gather(*(text(seed) for seed in range(8)))
        assert together == [await text(seed) for seed in range(8)]
