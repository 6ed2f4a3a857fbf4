"""The real server over a real socket, in the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
from fastapi import FastAPI

from reprise.api.app import create_app
from reprise.api.server import Server
from reprise.generation.interface import Engine
from reprise.settings import Settings
from reprise.text.tokenizer import Tokenizer
from support import openapi_document


class Loopback:
    """A running server: its app, where it listens, and a client of it."""

    def __init__(self, app: FastAPI, server: Server, port: int, client: httpx.AsyncClient) -> None:
        self.app = app
        self.server = server
        self.port = port
        self.client = client
        self.exit_code: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """A whole answer, checked against OpenAI's document where that is at hand."""
        response = await self.client.request(method, path, **kwargs)
        check_response(path, response)
        return response

    async def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return await self.request("GET", path, **kwargs)

    async def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return await self.request("POST", path, json=body, **kwargs)

    async def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The data of every event, parsed; the last is the string [DONE]."""
        response = await self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        return events(response.text)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)


RESPONSES = {
    "/v1/chat/completions": ("CreateChatCompletionResponse", "CreateChatCompletionStreamResponse"),
    "/v1/completions": ("CreateCompletionResponse", "CompletionChunk"),
    "/v1/models": ("ListModelsResponse", ""),
}


def check_response(path: str, response: httpx.Response) -> None:
    """Fail where an answer's shape is not OpenAI's."""
    if response.status_code >= 400:
        if path != "/ready":
            openapi_document.check("ErrorResponse", response.json())
        return
    whole, chunk = RESPONSES.get(path, ("Model" if path.startswith("/v1/models/") else "", ""))
    if response.headers["content-type"].startswith("text/event-stream"):
        for event in events(response.text):
            if event != "[DONE]":
                openapi_document.check("ErrorResponse" if "error" in event else chunk, event)
    elif whole:
        openapi_document.check(whole, response.json())


def events(text: str) -> list[Any]:
    """The data of server-sent events; anything but one `data:` line each, an `id:` and comments is an error."""
    return [data for data, _ in events_with_ids(text)]


def events_with_ids(text: str) -> list[tuple[Any, str | None]]:
    """As `events`, each with its id."""
    found: list[tuple[Any, str | None]] = []
    for block in text.split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        line, *further = block.split("\n")
        assert line.startswith("data: "), block
        assert [other[:4] for other in further] in ([], ["id: "]), block
        data = line.removeprefix("data: ")
        parsed = data if data == "[DONE]" else json.loads(data)
        found.append((parsed, further[0].removeprefix("id: ") if further else None))
    return found


Start = Callable[..., contextlib.AbstractAsyncContextManager[Loopback]]
"""Starts a server with the settings given as keywords."""


@contextlib.asynccontextmanager
async def serving(settings: Settings, tokenizer: Tokenizer, engine: Engine) -> AsyncIterator[Loopback]:
    """A server that runs until the block ends."""
    app = create_app(settings, tokenizer, engine, [settings.host])
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    port = listener.getsockname()[1]
    server = Server(app, settings, [listener])
    started = asyncio.Event()
    running = asyncio.create_task(server.run(started.set))
    await started.wait()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        loopback = Loopback(app, server, port, client)
        try:
            yield loopback
        finally:
            server.request_shutdown()
            server.request_shutdown()
            loopback.exit_code = await running


async def eventually(condition: Any, seconds: float = 10.0) -> None:
    """Wait until a condition holds; fail where it does not in time."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions are of any kind
            await asyncio.sleep(0.005)
