"""A client of a live server for tests: whole and streamed answers in one shape, and what /metrics says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.local_server import LocalServer
from support.loopback import check_response, events

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

Call = tuple[str, dict[str, Any]]
"""A path and a body."""


@dataclass
class Choice:
    """One choice, streamed or not. `logprobs` has an entry a token, in the endpoint's own form."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, part: dict[str, Any]) -> None:
        """Put a choice of a response, or of one of its chunks, to what is known."""
        assert self.finish_reason is None, "a part after the choice's end"
        message = part.get("delta", part.get("message"))
        self.text += part["text"] if message is None else message.get("content", "")
        self.token_ids += part.get("token_ids", [])
        if part.get("logprobs") is not None:
            self.logprobs = (self.logprobs or []) + _entries(part["logprobs"])
        self.finish_reason = part["finish_reason"]
        self.stop_reason = part.get("stop_reason")


@dataclass
class Answer:
    """A response, or the fold of a stream."""

    choices: list[Choice]
    usage: dict[str, Any] | None
    seed: int

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids


def assert_same(found: Sequence[Choice], expected: Sequence[Choice]) -> None:
    """Fail unless these are the same choices, to the character and the last bit of each log-probability."""
    assert list(found) == list(expected)


def of_response(body: dict[str, Any]) -> Answer:
    assert [part["index"] for part in body["choices"]] == list(range(len(body["choices"])))
    return _answer(body["choices"], body["usage"], body["reprise"]["seed"])


def of_events(stream: Sequence[Any]) -> Answer:
    """The fold of a whole stream's events."""
    assert stream[-1] == "[DONE]"
    chunks = stream[:-1]
    assert not [chunk for chunk in chunks if "error" in chunk], chunks[-1]
    for name in ("id", "created", "model", "object", "system_fingerprint"):
        assert len({chunk[name] for chunk in chunks}) == 1, name
    parts = [part for chunk in chunks for part in chunk["choices"]]
    usage = [chunk["usage"] for chunk in chunks if chunk.get("usage") is not None]
    assert len(usage) <= 1
    return _answer(parts, usage[0] if usage else None, chunks[0]["reprise"]["seed"])


def _answer(parts: Iterable[dict[str, Any]], usage: dict[str, Any] | None, seed: int) -> Answer:
    choices: dict[int, Choice] = {}
    for part in parts:
        choices.setdefault(part["index"], Choice()).add(part)
    ordered = [choices[index] for index in sorted(choices)]
    assert sorted(choices) == list(range(len(choices)))
    assert all(choice.finish_reason in ("stop", "length") for choice in ordered)
    return Answer(ordered, usage, seed)


def _entries(logprobs: dict[str, Any]) -> list[Any]:
    if "content" in logprobs:
        assert logprobs["refusal"] is None
        return list(logprobs["content"])
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return list(zip(*(logprobs[name] for name in names), strict=True))


class LiveApi:
    """Every answer is judged by OpenAI's own document where that is at hand."""

    def __init__(self, server: LocalServer, *, api_key: str | None = None) -> None:
        self.server = server
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self.client = httpx.Client(base_url=server.base_url, headers=headers, timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.client.close()

    def get(self, path: str) -> httpx.Response:
        response = self.client.get(path)
        check_response(path, response)
        return response

    def post(self, path: str, body: Any) -> httpx.Response:
        response = self.client.post(path, json=body)
        check_response(path, response)
        return response

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        """What is answered, streamed or not as the body says."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return of_events(events(response.text)) if body.get("stream") else of_response(response.json())

    def complete(self, prompt: Any = "The quick brown", **parameters: Any) -> Answer:
        return self.answer(COMPLETIONS, {"prompt": prompt, "return_token_ids": True, **parameters})

    def chat(self, content: str = "The quick brown", **parameters: Any) -> Answer:
        messages = [{"role": "user", "content": content}]
        return self.answer(CHAT, {"messages": messages, "return_token_ids": True, **parameters})

    def together(self, calls: Sequence[Call]) -> list[Answer]:
        """The answers of calls that are all in flight at once."""
        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(lambda call: self.answer(*call), calls))

    def tokenize(self, prompt: str, **options: Any) -> list[int]:
        response = self.post("/tokenize", {"prompt": prompt, **options})
        assert response.status_code == 200, response.text
        tokens: list[int] = response.json()["tokens"]
        return tokens

    def metrics(self) -> dict[str, float]:
        """Samples without labels, by their names without the prefix."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        return {
            sample.name.removeprefix("reprise_"): sample.value
            for family in families
            for sample in family.samples
            if not sample.labels
        }

    def wait_until(self, condition: Callable[[dict[str, float]], bool], seconds: float = 10.0) -> None:
        """Wait until the metrics are so."""
        deadline = time.monotonic() + seconds
        while not condition(metrics := self.metrics()):
            assert time.monotonic() < deadline, metrics
            time.sleep(0.01)

    def wait_idle(self) -> None:
        """Wait until nothing runs or waits and no KV block is held."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        self.wait_until(lambda metrics: not any(metrics[name] for name in names), seconds=5)

    def wait_running(self, num_sequences: int) -> None:
        """Wait until so many sequences run."""
        self.wait_until(lambda metrics: metrics["num_requests_running"] >= num_sequences)
