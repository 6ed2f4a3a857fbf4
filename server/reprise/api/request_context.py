"""The outermost layer of a request: its id, its headers, its cleanup, its errors, its count."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reprise.api.errors import log_unforeseen, to_reply
from reprise.api.limits import discard_body
from reprise.api.turns import Turns

CLIENT_CLOSED_REQUEST = 499
"""What metrics show for a client that left before its answer was complete; no client ever sees it."""
API_VERSION = "2020-10-01"
BEGUN_AT_ONCE = 2
"""Requests with a body that begin in one turn of the event loop: each may take a millisecond."""

_CLIENT_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
ObserveRequest = Callable[[str, int, float], None]


class RequestContext:
    """Pure ASGI. `scope["state"]` gets `request_id`, and `cleanup`, an ExitStack that is unwound when the
    request is over, however it ended: what a request holds is given back there, not in a generator that may
    never be closed.
    """

    def __init__(self, app: ASGIApp, *, observe: ObserveRequest) -> None:
        """observe: called once a request with the route's template, the status and the seconds it took."""
        self._app = app
        self._observe = observe
        self._turns = Turns(BEGUN_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(_client_request_id(scope) or new_request_id(), send)
        state = scope.setdefault("state", {})
        state["request_id"] = answer.request_id
        failed = False
        body = _Body(receive)
        try:
            with ExitStack() as state["cleanup"]:
                if scope["method"] == "POST":
                    await self._turns.take()
                await self._app(scope, body.receive, answer.send)
        except ClientDisconnect:
            pass
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a reply here
            if answer.status is None:
                await _reply(error, answer.request_id, scope, body, answer.send)
            else:
                # Too late for a reply. The server cuts the connection, so the client sees that a part is missing.
                log_unforeseen(error, answer.request_id)
                failed = True
        finally:
            status = answer.status if answer.complete else CLIENT_CLOSED_REQUEST
            route = getattr(scope.get("route"), "path", "unmatched")
            self._observe(route, 500 if failed else status or CLIENT_CLOSED_REQUEST, answer.seconds())


class _Body:
    """What is received for one request: sees whether it has come to its end."""

    def __init__(self, receive: Receive) -> None:
        self.complete = False
        self._receive = receive

    async def receive(self) -> Message:
        message = await self._receive()
        self.complete = self.complete or message["type"] != "http.request" or not message.get("more_body", False)
        return message


class _Answer:
    """What is sent for one request: puts its headers on, and sees how far it comes."""

    def __init__(self, request_id: str, send: Send) -> None:
        self.request_id = request_id
        self.status: int | None = None
        self.complete = False
        self._send = send
        self._began = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._began

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["openai-processing-ms"] = str(round(self.seconds() * 1000))
            headers["openai-version"] = API_VERSION
        await self._send(message)
        self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)


async def _reply(error: Exception, request_id: str, scope: Scope, body: _Body, send: Send) -> None:
    reply = to_reply(error, request_id=request_id)
    response = reply.response()
    if body.complete or response.headers.get("connection") != "close":
        await response(scope, body.receive, send)
        return
    await send({"type": "http.response.start", "status": reply.status, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    await discard_body(body.receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def new_request_id() -> str:
    return f"req_{uuid.uuid4().hex}"


def _client_request_id(scope: Scope) -> str | None:
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _CLIENT_ID.fullmatch(given[0]):
        return str(given[0].decode("ascii"))
    return None
