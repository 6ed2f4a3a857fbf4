"""The asynchronous client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Self

import httpx

from reprise_client import wire
from reprise_client.client import DEFAULT_TIMEOUT, connection_errors
from reprise_client.errors import ClientError, StreamBrokenError
from reprise_client.results import Chunk, Completion
from reprise_client.wire import Message, Prompt


class AsyncStream:
    """As `Stream`: closing it, or leaving its `async with` block, stops the generation."""

    def __init__(
        self,
        response: httpx.Response,
        open_stream: Callable[[Mapping[str, str]], Awaitable[httpx.Response]],
        *,
        resumes: int,
    ) -> None:
        """response: the first one. open_stream: sends the request again, with these headers too."""
        self.request_id: str | None = response.headers.get("x-request-id")
        self._open = open_stream
        self._response = response
        self._resumes = resumes
        self._closed = False
        self._chunks = self._read()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave the stream: the server stops generating. Idempotent."""
        self._closed = True
        await self._response.aclose()

    async def _read(self) -> AsyncIterator[Chunk]:
        decoder = wire.StreamDecoder(self.request_id)
        resumption = wire.Resumption(self._resumes, decoder)
        broken = False
        try:
            while True:
                try:
                    if broken:
                        self._response = await self._open(resumption.headers())
                        if self._closed:
                            raise StreamBrokenError("the stream was closed", request_id=self.request_id)
                        decoder.restart()
                    with connection_errors():
                        async for data in self._response.aiter_bytes():
                            for chunk in decoder.feed(data):
                                yield chunk
                    decoder.end()
                    return
                except ClientError as error:
                    if decoder.done:
                        return
                    delay = resumption.delay(error)
                    if delay is None or self._closed:
                        raise
                    broken = True
                    await self._response.aclose()
                    await asyncio.sleep(delay)
                    if self._closed:
                        raise
        finally:
            await self.close()


class AsyncClient:
    """`Client` for asyncio: the same methods and errors, awaited."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout: httpx.Timeout | float = DEFAULT_TIMEOUT,
        resumes: int = wire.DEFAULT_RESUMES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._model = model
        self._resumes = resumes
        self._http = httpx.AsyncClient(
            base_url=wire.root_url(base_url),
            headers=wire.headers(api_key),
            timeout=timeout,
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await self._http.aclose()

    async def models(self) -> list[str]:
        """Names of the models that are served."""
        return wire.parse_models((await self._request("GET", wire.MODELS_PATH)).json())

    async def chat(self, messages: str | Sequence[Message], **parameters: Any) -> Completion:
        """The answer to a conversation; a string is one message of the user."""
        body = wire.chat_body(await self._model_name(), messages, parameters, stream=False)
        return await self._complete(wire.CHAT_PATH, body)

    async def complete(self, prompt: Prompt, **parameters: Any) -> Completion:
        """The continuation of a text or of token ids, or of each prompt of a list."""
        body = wire.completion_body(await self._model_name(), prompt, parameters, stream=False)
        return await self._complete(wire.COMPLETION_PATH, body)

    async def stream_chat(self, messages: str | Sequence[Message], **parameters: Any) -> AsyncStream:
        """As `chat`, in pieces. The last chunk has the usage."""
        body = wire.chat_body(await self._model_name(), messages, parameters, stream=True)
        return await self._stream(wire.CHAT_PATH, body)

    async def stream_complete(self, prompt: Prompt, **parameters: Any) -> AsyncStream:
        """As `complete`, in pieces. The last chunk has the usage."""
        body = wire.completion_body(await self._model_name(), prompt, parameters, stream=True)
        return await self._stream(wire.COMPLETION_PATH, body)

    async def _model_name(self) -> str:
        if self._model is None:
            self._model = (await self.models())[0]
        return self._model

    async def _complete(self, path: str, body: dict[str, Any]) -> Completion:
        response = await self._request("POST", path, body)
        return wire.parse_completion(response.json(), response.headers.get("x-request-id"))

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncStream:
        async def open_stream(headers: Mapping[str, str]) -> httpx.Response:
            request = self._http.build_request("POST", path, json=body, headers=headers)
            with connection_errors():
                response = await self._http.send(request, stream=True)
                if response.is_success:
                    return response
                try:
                    content = await response.aread()
                finally:
                    await response.aclose()
                raise wire.parse_error(response.status_code, content, response.headers)

        return AsyncStream(await open_stream({}), open_stream, resumes=self._resumes)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        with connection_errors():
            response = await self._http.request(method, path, json=body)
        if not response.is_success:
            raise wire.parse_error(response.status_code, response.content, response.headers)
        return response
