"""The official client against the running server; its own types, validated strictly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from reprise.errors import GenerationError
from reprise.types import ChoiceDelta, FinishReason
from support.loopback import Loopback, Start, eventually
from support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


def strictly(value: BaseModel) -> None:
    """The client builds its types without validation; do it now."""
    type(value).model_validate(value.model_dump(), strict=True)


@pytest.fixture
async def client(server: Loopback) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


async def test_chat(client: AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(
        model="test/model", messages=MESSAGES, n=2, logprobs=True, top_logprobs=1, seed=1
    )
    strictly(completion)
    assert completion.choices[1].message.content == "Hello, world!"
    assert completion.choices[0].message.refusal is None
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    spelt = b"".join(bytes(token.bytes or []) for token in logprobs.content)
    assert spelt.decode() == completion.choices[0].message.content
    assert completion._request_id


async def test_chat_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="test/model", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    for chunk in chunks:
        strictly(chunk)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hello, world!"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens_details is not None


async def test_chat_stream_helper(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="test/model", messages=MESSAGES) as stream:
        async for _ in stream:
            pass
        completion = await stream.get_final_completion()
    assert completion.choices[0].message.content == "Hello, world!"


async def test_completions(client: AsyncOpenAI) -> None:
    completion = await client.completions.create(model="alias", prompt=["a", "b"], n=2, logprobs=1, echo=True)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert completion.choices[2].text == "bHello, world!"
    assert completion.model == "alias"


async def test_completion_stream(client: AsyncOpenAI) -> None:
    stream = await client.completions.create(model="test/model", prompt="a", stream=True, max_tokens=3)
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_sync_client(server: Loopback) -> None:
    def ask() -> tuple[str | None, str, list[str]]:
        with OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
            whole = client.chat.completions.create(model="test/model", messages=MESSAGES)
            strictly(whole)
            stream = client.chat.completions.create(model="test/model", messages=MESSAGES, stream=True)
            parts = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return whole.choices[0].message.content, parts, [model.id for model in client.models.list()]

    whole, parts, names = await asyncio.to_thread(ask)
    assert whole == parts == "Hello, world!"
    assert names == ["test/model", "alias"]


async def test_extensions_travel_in_the_extra_body(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    completion = await client.chat.completions.create(
        model="test/model", messages=MESSAGES, extra_body={"top_k": 5, "use_cache": False, "return_token_ids": True}
    )
    assert engine.requests[0].sampling.top_k == 5
    assert not engine.requests[0].sampling.use_cache
    assert (completion.model_extra or {})["reprise"]["seed"] == engine.requests[0].sampling.seed


async def test_its_errors(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="unknown", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model="test/model", messages=MESSAGES, temperature=3)
    assert (wrong.value.param, wrong.value.code) == ("temperature", "invalid_value")
    assert wrong.value.request_id
    engine.enqueue(
        [ChoiceDelta(index=0, text="a"), GenerationError("the logits are not numbers", code="numerical_error")]
    )
    stream = await client.chat.completions.create(model="test/model", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="The logits are not numbers"):
        async for _ in stream:
            pass


async def test_an_overloaded_server_is_tried_again(start: Start, engine: ScriptedEngine) -> None:
    engine.enqueue([hold := asyncio.Event(), ChoiceDelta(index=0, finish_reason=FinishReason.STOP)])
    async with start(max_num_seqs=1, max_waiting_seqs=0) as server:
        occupying = asyncio.create_task(server.post("/v1/completions", {"prompt": "a"}))
        await eventually(lambda: engine.streams)
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=1) as client:
            asking = asyncio.create_task(client.completions.create(model="test/model", prompt="b"))
            await eventually(lambda: server.app.state.service.admission.num_rejections == 1)
            hold.set()
            await occupying
            assert (await asking).choices[0].text == "Hello, world!"
