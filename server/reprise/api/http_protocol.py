"""uvicorn's HTTP protocol with bounds on time and size, which it lacks: a silent or stalled peer would stay
for ever.

A connection is in one of four states, each with its own deadline:

    waiting for a head   header_timeout, from accept or from the first byte of a further request
    waiting for a body   body_timeout, from the end of the head
    answering            request_timeout, from the end of the head to the last byte handed to the socket
    idle                 idle_timeout (uvicorn's timeout_keep_alive)

So an open connection always has a timer, or an application that is answering.

A request that comes while an earlier one is answered waits for its turn, and only then its deadlines begin. A refusal
waits likewise, so that nothing is ever written into another answer. Reading goes on meanwhile, as nothing else tells
that the client leaves, and what is more than is kept is refused.

Beside that, where an answer is complete, or its application waits because so much is unsent, the client has to take
LEAST_TAKEN_BYTES, or all there is, in each send_timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import socket
import struct
import termios
from typing import TYPE_CHECKING, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from reprise.api.deadline import Deadline
from reprise.api.errors import HttpError, to_reply
from reprise.api.request_context import new_request_id
from reprise.errors import OverloadedError
from reprise.settings import Settings

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, Scope

_MOST_MILLISECONDS = 2**31 - 1  # that the kernel takes
MAX_HEAD_BYTES = 64 * 1024
MAX_QUEUED_REQUESTS = 16
"""Of one connection, behind the one that is answered."""
MAX_QUEUED_BODY_BYTES = 64 * 1024
"""Of these together."""
LINGER_SECONDS = 1.0
LEAST_TAKEN_BYTES = 64 * 1024
"""What a client has to take in each send_timeout, where there is so much for it.

At the default that is a kilobyte a second, or three tokens with their events. Progress shows in steps: a client's
kernel whose buffer is full takes more only when a segment (64 KiB on loopback) and a sixteenth of that buffer are
free. So sure to stay is who reads this and one such step in send_timeout.
"""
OVERDUE_LOOK_SECONDS = 1.0
"""Between two looks at a request beyond its time that has taken all there is: its application is to end it."""


def _demote(record: logging.LogRecord) -> bool:
    """Uvicorn warns of each connection that sends no HTTP: anyone can send garbage all day."""
    if record.msg == "Invalid HTTP request received.":
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
    return True


logging.getLogger("uvicorn.error").addFilter(_demote)


class BoundedHttpProtocol(HttpToolsProtocol):
    """Use a subclass made by `bounded_by`. All times are in seconds."""

    header_timeout: ClassVar[float] = 10.0
    body_timeout: ClassVar[float] = 60.0
    send_timeout: ClassVar[float] = 60.0
    request_timeout: ClassVar[float | None] = None

    _answering: RequestResponseCycle | None = None
    """Whose turn it is. uvicorn's own `cycle` is the one that was read last, which may be queued."""
    _receipt_deadline: Deadline
    """Of what is read. Once nothing more is, of the peer's own end."""
    _answer_deadline: Deadline
    _stall_deadline: Deadline
    _reading_head = True
    """And not a body. It may not have begun yet."""
    _head_begun = False
    _head_bytes = 0
    _refused = False
    """Whether what comes is no longer read."""
    _refusal = b""
    """What is still to be said of that, after what is answered before it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._receipt_deadline = Deadline(self.loop)
        self._answer_deadline = Deadline(self.loop)
        self._stall_deadline = Deadline(self.loop)
        super().connection_made(transport)
        _tune(transport, self.send_timeout)
        self._set_receipt(self.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        for deadline in (self._receipt_deadline, self._answer_deadline, self._stall_deadline):
            deadline.cancel()
        self._unset_keepalive_if_required()
        self._dismiss()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._reading_head:
            if self._answering is None:
                self._begin_head()
            # A body that came with the head counts too: it ends the counting a moment later.
            self._head_bytes += len(data)
        super().data_received(data)
        if self._reading_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._refused:
            self._begin_head()

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._refuse_head()
        if self._refused:
            return
        super().on_headers_complete()
        self._reading_head = self._head_begun = False
        self._head_bytes = 0
        self._receipt_deadline.cancel()
        if self._answering is None:
            self._begin_turn(self.cycle)
        else:
            self._keep_reading()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)
            self._keep_reading()

    def on_message_complete(self) -> None:
        if not self._refused:
            self._receipt_deadline.cancel()
            self._reading_head = True
            super().on_message_complete()
            self._await_request()

    def on_response_complete(self) -> None:
        following = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        self._answering = None
        self._watch_stall()
        if self.transport.is_closing():
            return
        if following is not None:
            self._begin_turn(following)
        elif self._refusal:
            self._end_with(self._refusal)
        else:
            self._await_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        self._stall_deadline.cancel()
        super().resume_writing()
        if self._answering is None:
            self._watch_stall()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - the parser's caller gives it
        """The parser gave up."""
        self._refuse(HttpError(400, "The request is not valid HTTP.", code="invalid_http"))

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: the request is answered over HTTP/1.1."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Its end is noticed too where that is not the answer's: the connection is then closed, but what is unsent
        goes first.
        """

        async def watched(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
            try:
                return await app(scope, receive, send)
            finally:
                if self._answering is cycle and cycle.response_started and not cycle.response_complete:
                    self._answering = None
                    self._watch_stall()

        super()._start_asgi_task(cycle, watched)

    def _begin_head(self) -> None:
        """Its time runs where nothing is answered before it."""
        self._head_begun = True
        if self._answering is None and not self._receipt_deadline.is_set:
            self._set_receipt(self.header_timeout)

    def _await_request(self) -> None:
        """Begin the time of a further request. That of a body, which an early answer may not have waited for, runs."""
        self._unset_keepalive_if_required()
        if self._answering is not None or not self._reading_head or self.transport.is_closing():
            return
        if self._head_begun:
            self._set_receipt(self.header_timeout)
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _keep_reading(self) -> None:
        """Where requests are queued uvicorn pauses; here what is too much is refused."""
        bodies = sum(len(queued.body) for queued, _ in self.pipeline)
        if len(self.pipeline) > MAX_QUEUED_REQUESTS or bodies > MAX_QUEUED_BODY_BYTES:
            message = "Too much was sent behind a request that is still answered. Wait for answers, or connect anew."
            self._refuse(OverloadedError(message))
        elif self.pipeline:
            self.flow.resume_reading()

    def _begin_turn(self, cycle: RequestResponseCycle) -> None:
        """It is answered from now on, and its body may come."""
        self._answering = cycle
        if not self.flow.write_paused:
            self._stall_deadline.cancel()
        if cycle.more_body:
            self._set_receipt(self.body_timeout)
        if self.request_timeout is not None:
            self._answer_deadline.set(self.request_timeout, self._answer_overdue)

    def _dismiss(self) -> None:
        """Tell every request that its client has left."""
        for cycle in (self._answering, *(queued for queued, _ in self.pipeline)):
            if cycle is not None:
                cycle.disconnected = True
                cycle.waiting_for_100_continue = False
                cycle.message_event.set()
        self.pipeline.clear()
        self._answering = None

    def _set_receipt(self, seconds: float) -> None:
        self._unset_keepalive_if_required()
        self._receipt_deadline.set(seconds, self._receipt_overdue)

    def _receipt_overdue(self) -> None:
        if self.transport.is_closing():
            return
        if self._reading_head and not self._head_begun:
            self.transport.close()
        else:
            self._refuse(HttpError(408, "The request did not arrive in time.", code="request_timeout"))

    def _refuse_head(self) -> None:
        message = f"The request's head is larger than {MAX_HEAD_BYTES} bytes."
        self._refuse(HttpError(431, message, code="header_too_large"))

    def _refuse(self, error: HttpError | OverloadedError) -> None:
        """Read nothing more. Answer what is being read without the application, in its turn and if that has not begun
        to answer, and close.
        """
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._receipt_deadline.cancel()
        self.flow.resume_reading()
        request_id = new_request_id()
        reply = to_reply(error, request_id=request_id)
        body = reply.body()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-request-id": request_id,
            "connection": "close",
            **reply.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._refusal = STATUS_LINE[reply.status] + head.encode() + b"\r\n" + body
        if not self._reading_head:
            if self.pipeline:
                # Of what is queued, what is being read came last.
                self.pipeline.popleft()
            else:
                self._end_with(b"" if self.cycle.response_started else self._refusal)
        elif self._answering is None:
            self._end_with(self._refusal)

    def _end_with(self, answer: bytes) -> None:
        """Write this, and close once the peer has, or after a moment.

        Closing a socket with unread bytes resets the connection, and the peer may never see its answer.
        """
        self._refusal = b""
        self._dismiss()
        if answer:
            self.transport.write(answer)
        self._watch_stall()
        self.transport.write_eof()
        self._receipt_deadline.set(LINGER_SECONDS, self.transport.close)

    def _answer_overdue(self) -> None:
        """End what waits for its reader. What the application still does it ends itself, and says so."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        elif self._answering is not None:
            self._answer_deadline.set(OVERDUE_LOOK_SECONDS, self._answer_overdue)

    def _watch_stall(self) -> None:
        """To be called where nothing is written for a while: what the buffer loses is then what the client took."""
        self._stall_deadline.cancel()
        unsent = _unsent_bytes(self.transport)
        if unsent:
            self._stall_deadline.set(self.send_timeout, self._stalled, unsent)

    def _stalled(self, unsent_before: int) -> None:
        """A slow reader is served; one that took too little for send_timeout, or nothing, is not."""
        taken = unsent_before - _unsent_bytes(self.transport)
        if taken < min(LEAST_TAKEN_BYTES, unsent_before):
            self.transport.abort()
        else:
            self._watch_stall()


def bounded_by(settings: Settings) -> type[BoundedHttpProtocol]:
    """The protocol with these settings' deadlines."""
    names = ("header_timeout", "body_timeout", "send_timeout", "request_timeout")
    return type("BoundedHttpProtocol", (BoundedHttpProtocol,), {name: getattr(settings, name) for name in names})


def _tune(transport: asyncio.Transport, send_timeout: float) -> None:
    """Send each event at once, and have the kernel drop a peer that vanished without a word.

    asyncio sets TCP_NODELAY only on sockets whose protocol number is spelt out, which accepted ones' is not.
    """
    connection = transport.get_extra_info("socket")
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if (option := getattr(socket, "TCP_USER_TIMEOUT", None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, min(round(send_timeout * 1000), _MOST_MILLISECONDS))


def _unsent_bytes(transport: asyncio.Transport) -> int:
    """What the client has not taken yet of an answer that waits for it.

    With what the kernel holds of it, which may be megabytes: it asks for more only when a third of that has gone.
    """
    unsent = transport.get_write_buffer_size()
    connection = transport.get_extra_info("socket")
    if unsent and connection is not None:
        with contextlib.suppress(OSError, ValueError):
            unsent += struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
    return unsent
