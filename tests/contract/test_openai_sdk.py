"""OpenAI's own Python client against a live server."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam

from benchmarks.local_server import LocalServer
from support.live_api import LiveApi
from support.live_servers import API_KEY
from support.loopback import events
from support.openai_types import validate

MODEL = "tiny"
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "The quick brown"}, {"type": "text", "text": " fox"}]},
]
PROMPT = "The quick brown fox"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OPENAI_") and name != "OPENAI_OPENAPI"]:
        monkeypatch.delenv(name)


@pytest.fixture
def client(llama_server: LocalServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=llama_server.base_url + "/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def run_async(server: LocalServer, work: Callable[[AsyncOpenAI], Awaitable[None]]) -> None:
    async def main() -> None:
        url = server.base_url + "/v1"
        async with AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60) as client:
            await work(client)

    asyncio.run(main())


def chat_text(client: OpenAI, **parameters: Any) -> str:
    parameters = {"model": MODEL, "messages": MESSAGES, "max_tokens": 16, "seed": 1, **parameters}
    completion: ChatCompletion = client.chat.completions.create(**parameters)
    assert completion.choices[0].message.content is not None
    return completion.choices[0].message.content


def test_chat(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, max_tokens=16, seed=1)
    completion = validate(ChatCompletion, json.loads(raw.content))
    assert completion.id.startswith("chatcmpl-")
    assert completion.model == MODEL
    assert completion.system_fingerprint
    assert completion.system_fingerprint.startswith("fp_")
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.refusal, choice.logprobs) == ("assistant", None, None)
    assert choice.message.content
    assert choice.message.tool_calls is None
    assert completion.usage is not None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    assert raw.parse().choices[0].message.content == choice.message.content


def test_headers(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, max_tokens=1, seed=7)
    assert raw.headers["x-request-id"]
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.headers["x-reprise-seed"] == "7"
    assert raw.headers["content-type"] == "application/json"
    parsed = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)
    assert parsed._request_id


def test_chat_stream(client: OpenAI) -> None:
    parameters: dict[str, Any] = {"max_tokens": 24, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, **parameters)
    texts = ["", ""]
    roles, reasons = [], []
    usage = None
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **parameters
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * 2
    assert sorted(reasons) == sorted(choice.finish_reason for choice in whole.choices)
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_chat_chunks_are_of_the_clients_type(client: OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=MESSAGES, max_tokens=12, seed=7, n=2, logprobs=True, stream=True,
        stream_options={"include_usage": True},
    ) as response:  # fmt: skip
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = [validate(ChatCompletionChunk, event) for event in events(response.read().decode())[:-1]]
    assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert all(len(chunk.choices) == 1 for chunk in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage is not None) == ([], True)
    for index in (0, 1):
        deltas = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert (deltas[0].delta.role, deltas[0].delta.content) == ("assistant", "")
        assert (deltas[-1].delta.content, deltas[-1].finish_reason) == (None, "length")
        assert all(choice.finish_reason is None for choice in deltas[:-1])


def test_the_clients_own_helpers(client: OpenAI) -> None:
    """`parse` and `stream` put answers together themselves, and want them to end by `stop`."""
    free = chat_text(client, temperature=0)
    parameters: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "stop": free[6:8]}
    expected = chat_text(client, temperature=0, stop=free[6:8])
    parsed = client.chat.completions.parse(**parameters)
    assert parsed.choices[0].message.content == expected
    with client.chat.completions.stream(logprobs=True, **parameters) as events_:
        kinds = {event.type for event in events_}
        final = events_.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert final.choices[0].message.content == expected


@pytest.mark.parametrize(
    ("prompt", "num_choices"),
    [(PROMPT, 1), ([PROMPT, "def"], 2), ([1, 294, 418], 1), ([[1, 294], [1, 418]], 2), ("", 1)],
    ids=["string", "strings", "ids", "lists-of-ids", "empty"],
)
def test_completions(client: OpenAI, prompt: Any, num_choices: int) -> None:
    raw = client.completions.with_raw_response.create(model=MODEL, prompt=prompt, n=2, max_tokens=6, seed=2)
    completion = validate(Completion, json.loads(raw.content))
    assert completion.id.startswith("cmpl-")
    assert [choice.index for choice in completion.choices] == list(range(2 * num_choices))
    texts = [""] * 2 * num_choices
    for chunk in client.completions.create(model=MODEL, prompt=prompt, n=2, max_tokens=6, seed=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in completion.choices]


def test_completion_chunks_are_of_the_clients_type(client: OpenAI) -> None:
    with client.completions.with_streaming_response.create(
        model=MODEL, prompt=PROMPT, max_tokens=6, logprobs=2, stream=True, stream_options={"include_usage": True}
    ) as response:
        chunks = events(response.read().decode())[:-1]
    for chunk in chunks:
        for choice in chunk["choices"]:
            # OpenAI sends null before the end and declares otherwise.
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        validate(Completion, chunk)
    assert chunks[-1]["choices"] == []


def test_legacy_logprobs(client: OpenAI) -> None:
    scored = client.completions.create(model=MODEL, prompt=PROMPT, echo=True, max_tokens=0, logprobs=2)
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs[0] is None
    assert all(logprob < 0 for logprob in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens).removeprefix("<s>") == PROMPT == scored.choices[0].text
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0


def test_chat_logprobs(client: OpenAI) -> None:
    completion = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=20, seed=4, logprobs=True, top_logprobs=5
    )
    choice = completion.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert choice.logprobs.refusal is None
    data = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert data.decode(errors="replace") == choice.message.content
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 5
        likely = [top.logprob for top in entry.top_logprobs]
        assert likely == sorted(likely, reverse=True)
        assert entry.logprob <= likely[0] + 1e-6


def test_parameters_of_openai(client: OpenAI) -> None:
    free = chat_text(client, temperature=0)
    assert chat_text(client, temperature=0, stop=free[3:6]) == free[: free.index(free[3:6])]
    assert chat_text(client, temperature=0, logit_bias={"40": 100}, max_tokens=3) == chat_text(
        client, extra_body={"allowed_token_ids": [40]}, max_tokens=3
    )
    assert chat_text(client, seed=5) == chat_text(client, seed=5) != chat_text(client, seed=6)
    assert chat_text(client, top_p=0) == free
    assert chat_text(client, temperature=0, presence_penalty=2, frequency_penalty=2, max_tokens=40) != chat_text(
        client, temperature=0, max_tokens=40
    )
    for name in ("max_tokens", "max_completion_tokens"):
        completion = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, extra_body={"ignore_eos": True, name: 5}
        )
        assert completion.usage is not None
        assert (completion.usage.completion_tokens, completion.choices[0].finish_reason) == (5, "length")
    three = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=3, seed=1, max_tokens=16)
    assert len({choice.message.content for choice in three.choices}) == 3
    assert three.choices[0].message.content == chat_text(client)


def test_parameters_of_reprise_go_through_extra_body(client: OpenAI) -> None:
    completion = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=12,
        user="somebody",
        extra_body={"top_k": 1, "repetition_penalty": 1.1, "ignore_eos": True, "return_token_ids": True},
    )
    assert completion.choices[0].model_extra is not None
    assert len(completion.choices[0].model_extra["token_ids"]) == 12
    assert completion.model_extra is not None
    assert completion.model_extra["reprise"]["ignored_parameters"] == ["user"]
    again = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        extra_body={"repetition_penalty": 1.1, "ignore_eos": True, "use_cache": False},
    )
    assert again.choices[0].message.content == completion.choices[0].message.content
    word = next(part for part in (again.choices[0].message.content or "").replace("\ufffd", " ").split())
    assert word not in chat_text(client, temperature=0, extra_body={"bad_words": [word]})


def test_models(client: OpenAI) -> None:
    listed = client.models.with_raw_response.list()
    body = json.loads(listed.content)
    assert body["object"] == "list"
    assert [validate(Model, entry).id for entry in body["data"]] == [MODEL]
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_errors(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "invalid_value",
        "invalid_request_error",
    )
    assert bad.value.request_id
    assert "2" in bad.value.message
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model=MODEL, prompt="a", extra_body={"temprature": 1})
    assert (unknown.value.param, unknown.value.code) == ("temprature", "unknown_parameter")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-17", messages=MESSAGES)
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-17")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="a")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[5] * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as streamed:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, top_p=2, stream=True)
    assert streamed.value.param == "top_p"


def test_an_error_in_a_stream(client: OpenAI) -> None:
    """Two masks that contradict each other show in the engine only, when the stream has begun."""
    body = {"allowed_token_ids": [40], "min_tokens": 1, "bad_words": [2 * _spelling(client, 40)]}
    with pytest.raises(openai.APIError) as failed:
        list(client.completions.create(model=MODEL, prompt="a", stream=True, extra_body=body))
    assert failed.value.code == "no_admissible_token"
    assert "allowed_token_ids" in failed.value.message


def _spelling(client: OpenAI, token_id: int) -> str:
    completion = client.completions.create(
        model=MODEL, prompt="a", max_tokens=1, extra_body={"allowed_token_ids": [token_id]}
    )
    return completion.choices[0].text


def test_keys(keyed_server: LocalServer) -> None:
    url = keyed_server.base_url + "/v1"
    with OpenAI(base_url=url, api_key="sk-wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    with OpenAI(base_url=url, api_key=API_KEY, max_retries=0) as friend:
        assert friend.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1).choices


def test_a_stream_that_is_closed_early_frees_its_place(client: OpenAI, api: LiveApi) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, max_tokens=3500, n=2, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    api.wait_running(2)
    stream.close()
    api.wait_idle()


def test_async(llama_server: LocalServer, client: OpenAI) -> None:
    expected = [chat_text(client, seed=seed) for seed in range(12)]

    async def one(client: AsyncOpenAI, seed: int, *, stream: bool) -> str:
        parameters: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "seed": seed, "max_tokens": 16}
        if not stream:
            completion = await client.chat.completions.create(**parameters)
            return completion.choices[0].message.content or ""
        text = ""
        async for chunk in await client.chat.completions.create(**parameters, stream=True):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        return text

    async def work(client: AsyncOpenAI) -> None:
        assert [model.id async for model in client.models.list()] == [MODEL]
        for stream in (False, True):
            assert await asyncio.gather(*(one(client, seed, stream=stream) for seed in range(12))) == expected
        completion = await client.completions.create(model=MODEL, prompt=["a", ""], max_tokens=3)
        assert len(completion.choices) == 2
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, n=0)

    run_async(llama_server, work)


def test_async_streams_that_are_left(llama_server: LocalServer, api: LiveApi) -> None:
    async def work(client: AsyncOpenAI) -> None:
        stream = await client.completions.create(
            model=MODEL, prompt=PROMPT, stream=True, max_tokens=3500, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            break
        await stream.close()
        waiting = asyncio.create_task(
            client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3500, extra_body={"ignore_eos": True})
        )
        await asyncio.to_thread(api.wait_running, 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    run_async(llama_server, work)
    api.wait_idle()
