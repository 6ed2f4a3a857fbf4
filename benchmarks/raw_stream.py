"""A streaming client that costs a few microseconds a token: it notes when bytes come and reads them afterwards.

Where the server has two cores, a client that parses every event while the server computes takes them from it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

LAST_CHUNK = b"\r\n0\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    """A stream that ended. Seconds on the clock of `time.perf_counter`; token counts are those of the server."""

    start: float
    first: float | None
    """When the first text came; nothing where none came."""
    end: float
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    num_events: int = 0
    """Events with data, [DONE] left out."""


class _Exchange(asyncio.Protocol):
    """Sends one request and collects what comes back until the response is complete or the connection ends."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.arrivals: list[tuple[float, bytes]] = []
        self.finished = asyncio.get_running_loop().create_future()
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 # what create_connection makes
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.arrivals.append((time.perf_counter(), data))
        self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
        if self._tail == LAST_CHUNK:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 # given by the protocol
        self._finish()

    def _finish(self) -> None:
        if not self.finished.done():
            self.finished.set_result(None)


async def stream(base_url: str, body: Mapping[str, Any], *, limit: float = 600.0) -> Answer:
    """Send one streaming completion on a connection of its own; what goes wrong is in the answer's `error`."""
    url = urlsplit(base_url)
    host, port = url.hostname or "127.0.0.1", url.port or 80
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    start = time.perf_counter()
    try:
        async with asyncio.timeout(limit):
            transport, exchange = await asyncio.get_running_loop().create_connection(
                lambda: _Exchange(head.encode() + content), host, port
            )
            try:
                await exchange.finished
            finally:
                transport.close()
    except (OSError, TimeoutError) as error:
        return Answer(start, None, time.perf_counter(), error=f"{type(error).__name__}: {error}")
    return read_answer(start, exchange.arrivals)


def read_answer(start: float, arrivals: list[tuple[float, bytes]]) -> Answer:
    """Read what came, in the pieces and at the times in which it came."""
    end = arrivals[-1][0] if arrivals else start
    head, _, rest = b"".join(data for _, data in arrivals).partition(b"\r\n\r\n")
    if b" 200 " not in head[:13]:
        return Answer(start, None, end, error=(head[:80] + b" " + rest[-400:]).decode(errors="replace"))
    first: float | None = None
    num_events = 0
    usage: Mapping[str, Any] = {}
    for when, line in _lines(arrivals):
        if not line.startswith(b"data:") or line.endswith(b"[DONE]"):
            continue
        num_events += 1
        if b'"error"' in line:
            return Answer(start, first, end, error=line[:400].decode(errors="replace"))
        # Most events are neither the first with text nor carry counts: they are not parsed.
        if first is None or b'"completion_tokens"' in line:
            event = json.loads(line.removeprefix(b"data:"))
            usage = event.get("usage") or usage
            if first is None and any(choice.get("text") or choice.get("token_ids") for choice in event["choices"]):
                first = when
    missing = None if "completion_tokens" in usage else "the stream ended without the counts of its tokens"
    prompt_tokens, completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return Answer(start, first, end, prompt_tokens, completion_tokens, missing, num_events)


def _lines(arrivals: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Lines, each with the time of its last byte. Servers put whole events into a chunk, so no chunk is undone."""
    rest = b""
    for when, data in arrivals:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield when, line.rstrip(b"\r")
    if rest:
        yield arrivals[-1][0], rest
