"""Bounds on request bodies, enforced while they arrive."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reprise.api.errors import HttpError
from reprise.errors import OverloadedError

MAX_LARGEST_BODIES = 64
"""How many bodies of the largest size may be held at once, in all bodies' bytes."""
LINGER_SECONDS = 2.0
LINGER_BYTES = 256 * 1024**2


class LimitBody:
    """Pure ASGI. Counts the bytes that really come, whatever the headers say.

    Raises HttpError 413 for a body that is too large, OverloadedError where all bodies together are.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._num_held = 0
        """Bytes of the bodies of all requests that are being served."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared[:20]) > self._max_bytes:
            raise self._too_large()
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            received = len(message.get("body", b""))
            num_bytes += received
            self._num_held += received
            if num_bytes > self._max_bytes:
                raise self._too_large()
            if self._num_held > MAX_LARGEST_BODIES * self._max_bytes:
                raise OverloadedError("the requests being served are too large together; try again later")
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._num_held -= num_bytes

    def _too_large(self) -> HttpError:
        return HttpError(
            413,
            f"The body is larger than this server's limit of {self._max_bytes} bytes.",
            code="request_too_large",
            headers={"connection": "close"},
        )


async def discard_body(receive: Receive) -> None:
    """Read on for a moment after a refusal.

    Closing a socket with unread bytes resets the connection, and the client may never see the answer.
    """
    num_bytes = 0
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while num_bytes < LINGER_BYTES:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                num_bytes += len(message.get("body", b""))
    except TimeoutError:
        return
