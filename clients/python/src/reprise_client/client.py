"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import httpx

from reprise_client import wire
from reprise_client.errors import ClientError, ConnectionFailedError, StreamBrokenError
from reprise_client.results import Chunk, Completion
from reprise_client.wire import Message, Prompt

DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
"""Seconds: 5 to connect, 600 between any two pieces of an answer."""


@contextmanager
def connection_errors() -> Iterator[None]:
    """Turn the transport's errors into one of ours."""
    try:
        yield
    except httpx.TransportError as error:
        raise ConnectionFailedError(f"no answer from the server: {error or type(error).__name__}") from error


class Stream:
    """The chunks of an answer as they come. Closing it, or leaving its `with` block, stops the generation.

    Where the connection breaks, it is made again and the stream goes on where it was.
    """

    def __init__(self, open_stream: Callable[[Mapping[str, str]], httpx.Response], *, resumes: int) -> None:
        """open_stream: sends the request with these headers too. resumes: attempts in a row that may fail."""
        self._open = open_stream
        self._response = open_stream({})
        self.request_id: str | None = self._response.headers.get("x-request-id")
        self._resumes = resumes
        self._closed = False
        self._chunks = self._read()

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the stream: the server stops generating. Idempotent."""
        self._closed = True
        self._response.close()

    def _read(self) -> Iterator[Chunk]:
        decoder = wire.StreamDecoder(self.request_id)
        resumption = wire.Resumption(self._resumes, decoder)
        broken = False
        try:
            while True:
                try:
                    if broken:
                        self._response = self._open(resumption.headers())
                        if self._closed:
                            raise StreamBrokenError("the stream was closed", request_id=self.request_id)
                        decoder.restart()
                    with connection_errors():
                        for data in self._response.iter_bytes():
                            yield from decoder.feed(data)
                    decoder.end()
                    return
                except ClientError as error:
                    if decoder.done:
                        return
                    delay = resumption.delay(error)
                    if delay is None or self._closed:
                        raise
                    broken = True
                    self._response.close()
                    time.sleep(delay)
                    if self._closed:
                        raise
        finally:
            self.close()


class Client:
    """Talks to one server. Use it as a context manager, or close it.

    `model` is the model that requests name; None takes the first one that the server lists. Parameters of the
    methods go into the request as they are: `temperature=0`, `seed=7`, `max_tokens=100`, `use_cache=False`, …
    Raises APIError, ConnectionFailedError and StreamBrokenError. A stream whose connection breaks is resumed, at most
    `resumes` times in a row without a new event (0 for never); nothing else is tried twice.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout: httpx.Timeout | float = DEFAULT_TIMEOUT,
        resumes: int = wire.DEFAULT_RESUMES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._model = model
        self._resumes = resumes
        self._http = httpx.Client(
            base_url=wire.root_url(base_url),
            headers=wire.headers(api_key),
            timeout=timeout,
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._http.close()

    def models(self) -> list[str]:
        """Names of the models that are served."""
        return wire.parse_models(self._request("GET", wire.MODELS_PATH).json())

    def chat(self, messages: str | Sequence[Message], **parameters: Any) -> Completion:
        """The answer to a conversation; a string is one message of the user."""
        return self._complete(wire.CHAT_PATH, wire.chat_body(self._model_name(), messages, parameters, stream=False))

    def complete(self, prompt: Prompt, **parameters: Any) -> Completion:
        """The continuation of a text or of token ids, or of each prompt of a list."""
        return self._complete(
            wire.COMPLETION_PATH, wire.completion_body(self._model_name(), prompt, parameters, stream=False)
        )

    def stream_chat(self, messages: str | Sequence[Message], **parameters: Any) -> Stream:
        """As `chat`, in pieces. The last chunk has the usage."""
        return self._stream(wire.CHAT_PATH, wire.chat_body(self._model_name(), messages, parameters, stream=True))

    def stream_complete(self, prompt: Prompt, **parameters: Any) -> Stream:
        """As `complete`, in pieces. The last chunk has the usage."""
        return self._stream(
            wire.COMPLETION_PATH, wire.completion_body(self._model_name(), prompt, parameters, stream=True)
        )

    def _model_name(self) -> str:
        if self._model is None:
            self._model = self.models()[0]
        return self._model

    def _complete(self, path: str, body: dict[str, Any]) -> Completion:
        response = self._request("POST", path, body)
        return wire.parse_completion(response.json(), response.headers.get("x-request-id"))

    def _stream(self, path: str, body: dict[str, Any]) -> Stream:
        def open_stream(headers: Mapping[str, str]) -> httpx.Response:
            request = self._http.build_request("POST", path, json=body, headers=headers)
            with connection_errors():
                response = self._http.send(request, stream=True)
                if response.is_success:
                    return response
                try:
                    content = response.read()
                finally:
                    response.close()
                raise wire.parse_error(response.status_code, content, response.headers)

        return Stream(open_stream, resumes=self._resumes)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        with connection_errors():
            response = self._http.request(method, path, json=body)
        if not response.is_success:
            raise wire.parse_error(response.status_code, response.content, response.headers)
        return response
