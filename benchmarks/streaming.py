"""A streaming client of little weight, so that measuring costs the server's machine as little as can be."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class StreamTimes:
    """One streamed request, timed from when it was sent. Seconds on a monotonic clock."""

    start: float
    arrivals: list[float] = field(default_factory=list)
    """When each piece of text or tokens came."""
    token_counts: list[int] = field(default_factory=list)
    """Tokens in each of these pieces, where the server says their ids; else nothing."""
    usage_tokens: int | None = None
    end: float = 0.0
    error: str | None = None

    @property
    def num_counted_tokens(self) -> int | None:
        return sum(self.token_counts) if self.token_counts else None


class RequestFailedError(Exception):
    """The server refused, or the answer was none that can be read."""


async def stream_completion(
    base_url: str, body: Mapping[str, Any], *, api_key: str | None = None, limit: float = 600.0
) -> StreamTimes:
    """Send one streaming request on its own connection and time its pieces, for `limit` seconds at most."""
    times = StreamTimes(start=time.perf_counter())
    try:
        async with asyncio.timeout(limit):
            async for data in _events(base_url, "/v1/completions", body, api_key):
                _note(times, data, time.perf_counter())
    except (OSError, EOFError, TimeoutError, ValueError, RequestFailedError) as error:
        times.error = f"{type(error).__name__}: {error}"
    times.end = time.perf_counter()
    return times


def _note(times: StreamTimes, data: bytes, now: float) -> None:
    event = json.loads(data)
    if event.get("error"):
        raise RequestFailedError(str(event["error"]))
    if usage := event.get("usage"):
        times.usage_tokens = usage["completion_tokens"]
    for choice in event["choices"]:
        token_ids = choice.get("token_ids")
        if token_ids:
            times.token_counts.append(len(token_ids))
        if token_ids or choice.get("text"):
            times.arrivals.append(now)


async def _events(base_url: str, path: str, body: Mapping[str, Any], api_key: str | None) -> AsyncIterator[bytes]:
    """The data of each server-sent event of one line, up to [DONE]."""
    url = urlsplit(base_url)
    secure = url.scheme == "https"
    reader, writer = await asyncio.open_connection(
        url.hostname, url.port or (443 if secure else 80), ssl=secure or None, limit=1 << 20
    )
    try:
        content = json.dumps(body).encode()
        prefix = url.path.rstrip("/").removesuffix("/v1")
        head = [
            f"POST {prefix}{path} HTTP/1.1",
            f"Host: {url.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
            "Connection: close",
            *([f"Authorization: Bearer {api_key}"] if api_key else []),
        ]
        writer.write("\r\n".join([*head, "", ""]).encode() + content)
        status, headers = await _read_head(reader)
        if status != 200:
            text = b"".join([part async for part in _body(reader, headers)])
            raise RequestFailedError(f"{status}: {text[:500].decode(errors='replace')}")
        rest = b""
        async for part in _body(reader, headers):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                if data == b"[DONE]":
                    return
                if data:
                    yield data
        raise RequestFailedError("the stream ended before it was complete")
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
    headers = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(status_line.split()[1]), {name.lower(): value.strip() for name, value in headers.items()}


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while part := await reader.read(1 << 16):
            yield part
