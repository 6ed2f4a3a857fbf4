"""The protocol without any I/O, for both clients: requests to JSON, JSON to results, lines to events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reprise_client.errors import APIError, ClientError, StreamBrokenError
from reprise_client.results import Choice, Chunk, Completion, Usage

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
"""A text or its token ids, or a list of either; choice `i * n + k` is then the k-th answer to prompt `i`."""

CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"
MODELS_PATH = "/v1/models"
DEFAULT_RESUMES = 12
"""With the delays below they take some 30 seconds: a server that is started again is there by then."""
_FIRST_DELAY = 0.1
_LONGEST_DELAY = 5.0
_MAY_PASS = {429, 502, 503, 504}


def root_url(base_url: str) -> str:
    """The server's root, whether or not the address given ends in /v1."""
    return base_url.rstrip("/").removesuffix("/v1")


def headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def chat_body(
    model: str, messages: str | Sequence[Message], parameters: Mapping[str, Any], *, stream: bool
) -> dict[str, Any]:
    """A chat request; a string is one message of the user."""
    listed = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return {"model": model, "messages": listed, **_streaming(stream=stream), **parameters}


def completion_body(model: str, prompt: Prompt, parameters: Mapping[str, Any], *, stream: bool) -> dict[str, Any]:
    """A completion request for one prompt or several."""
    if isinstance(prompt, str):
        listed: str | list[Any] = prompt
    else:
        listed = [item if isinstance(item, str | int) else list(item) for item in prompt]
    return {"model": model, "prompt": listed, **_streaming(stream=stream), **parameters}


def _streaming(*, stream: bool) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {}


def parse_models(answer: Mapping[str, Any]) -> list[str]:
    return [model["id"] for model in answer["data"]]


def parse_completion(answer: Mapping[str, Any], request_id: str | None) -> Completion:
    choices = [
        Choice(
            index=choice["index"],
            text=choice["text"] if "text" in choice else choice["message"]["content"] or "",
            finish_reason=choice["finish_reason"],
            raw=choice,
        )
        for choice in answer["choices"]
    ]
    return Completion(
        id=answer["id"],
        model=answer["model"],
        choices=tuple(sorted(choices, key=lambda choice: choice.index)),
        usage=_parse_usage(answer["usage"]),
        request_id=request_id,
        raw=answer,
    )


def parse_error(status: int, content: bytes, response_headers: Mapping[str, str]) -> APIError:
    """The error of a response that is none of success; its body may be anything."""
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        error = {}
    if not isinstance(error, dict):
        error = {"message": str(error)}
    try:
        retry_after = float(response_headers.get("retry-after", ""))
    except ValueError:
        retry_after = None
    return APIError(
        error.get("message") or f"the server answered {status} without saying why",
        status=status,
        error_type=error.get("type"),
        param=error.get("param"),
        code=error.get("code"),
        retry_after=retry_after,
        request_id=response_headers.get("x-request-id"),
    )


def _parse_usage(usage: Mapping[str, Any]) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage.get("completion_tokens", 0),
        cached_tokens=details.get("cached_tokens") or 0,
    )


class StreamDecoder:
    """The bytes of a server-sent event stream to chunks; `done` once the server has said that it is complete.

    `num_events` counts the whole ones that were no error, `last_event_id` is the id of the last that had one.
    """

    def __init__(self, request_id: str | None) -> None:
        self.done = False
        self.num_events = 0
        self.last_event_id: str | None = None
        self._request_id = request_id
        self._begun: list[bytes] = []
        """Pieces of the line that is not complete yet."""
        self._data: list[str] = []
        self._event_id: str | None = None

    @property
    def resumable(self) -> bool:
        """Whether the server can tell what is missing; where nothing came, that is all."""
        return self.last_event_id is not None or self.num_events == 0

    def restart(self) -> None:
        """Another connection goes on after the last whole event."""
        self._begun, self._data, self._event_id = [], [], None

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """The chunks that these bytes complete. Raises APIError where the server reports one in the stream.

        Only what ends a line of such a stream ends one here: a text may have other characters that `str.splitlines`,
        and httpx's lines with it, take for the end of a line.
        """
        first, *others = data.split(b"\n")
        self._begun.append(first)
        if others:
            first, self._begun = b"".join(self._begun), [others.pop()]
            for line in (first, *others):
                yield from self._feed_line(line.removesuffix(b"\r").decode(errors="replace"))

    def _feed_line(self, line: str) -> list[Chunk]:
        if line.startswith("data:"):
            self._data.append(line[5:].removeprefix(" "))
            return []
        if line.startswith("id:"):
            self._event_id = line[3:].removeprefix(" ")
            return []
        if line or not self._data:
            return []  # a comment, a field that is not used here, or nothing to send
        data, self._data = "\n".join(self._data), []
        self.last_event_id = self._event_id or self.last_event_id
        if data == "[DONE]":
            self.done = True
            return []
        return self._chunks(json.loads(data))

    def end(self) -> None:
        """Raise StreamBrokenError unless the stream is complete."""
        if not self.done:
            raise StreamBrokenError("the stream ended before it was complete", request_id=self._request_id)

    def _chunks(self, event: Mapping[str, Any]) -> list[Chunk]:
        if error := event.get("error"):
            raise APIError(
                error.get("message", "the generation failed"),
                status=None,
                error_type=error.get("type"),
                param=error.get("param"),
                code=error.get("code"),
                request_id=self._request_id,
            )
        self.num_events += 1
        usage = _parse_usage(event["usage"]) if event.get("usage") else None
        if not event["choices"]:
            return [Chunk(index=0, text="", finish_reason=None, usage=usage, raw=event)]
        return [
            Chunk(
                index=choice["index"],
                text=(choice["text"] if "text" in choice else choice["delta"].get("content")) or "",
                finish_reason=choice["finish_reason"],
                usage=usage,
                raw=event,
            )
            for choice in event["choices"]
        ]


class Resumption:
    """How often, and after how long, a stream that broke is asked for again. Each new event makes it begin anew."""

    def __init__(self, limit: int, decoder: StreamDecoder) -> None:
        """limit: attempts in a row that bring nothing; 0 for none at all."""
        self._limit = limit
        self._decoder = decoder
        self._num_failed = 0
        self._num_events = 0

    def delay(self, error: ClientError) -> float | None:
        """Seconds to wait before the next attempt; None where the error is to be raised instead."""
        if self._decoder.num_events > self._num_events:
            self._num_events, self._num_failed = self._decoder.num_events, 0
        self._num_failed += 1
        if self._num_failed > self._limit or not self._decoder.resumable or not _may_pass(error):
            return None
        delay = 0.0 if self._num_failed == 1 else _FIRST_DELAY * 2 ** (self._num_failed - 2)
        if isinstance(error, APIError) and error.retry_after is not None:
            delay = max(delay, error.retry_after)
        return min(delay, _LONGEST_DELAY)

    def headers(self) -> dict[str, str]:
        """What the next attempt is sent with, besides the very same body."""
        last = self._decoder.last_event_id
        return {} if last is None else {"Last-Event-ID": last}


def _may_pass(error: ClientError) -> bool:
    """Whether it may be otherwise with the next attempt, with this server or with another one at its address."""
    if isinstance(error, APIError):
        return error.status in _MAY_PASS or (error.status is None and error.code == "service_unavailable")
    return True
