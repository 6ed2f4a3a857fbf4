"""uvicorn's HTTP protocol with bounds on time and size, which it lacks: a silent or stalled peer would stay
for ever.

A connection is in one of four states, each with its own deadline:

    waiting for a head   header_timeout, from accept or from the first byte of a further request
    waiting for a body   body_timeout, from the end of the head
    answering            none here; a write that stalls for send_timeout aborts the connection
    idle                 idle_timeout (uvicorn's timeout_keep_alive)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import ClassVar

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from reprise.api.request_context import new_request_id
from reprise.protocol.responses import Error, ErrorResponse
from reprise.settings import Settings

MAX_HEAD_BYTES = 64 * 1024
LINGER_SECONDS = 1.0


def _demote(record: logging.LogRecord) -> bool:
    """Uvicorn warns of each connection that sends no HTTP: anyone can send garbage all day."""
    if record.msg == "Invalid HTTP request received.":
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
    return True


logging.getLogger("uvicorn.error").addFilter(_demote)


class BoundedHttpProtocol(HttpToolsProtocol):
    """Use a subclass made by `bounded_by`."""

    header_timeout: ClassVar[float] = 10.0
    body_timeout: ClassVar[float] = 60.0
    send_timeout: ClassVar[float] = 60.0

    _receipt_deadline: asyncio.TimerHandle | None = None
    _stall_deadline: asyncio.TimerHandle | None = None
    _reading_head = True
    _head_bytes = 0
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _tune(transport, self.send_timeout)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_receipt()
        self._cancel_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._is_idle():
            self._await_head()
        if self._reading_head:
            # A body that came with the head counts too: it ends the counting a moment later.
            self._head_bytes += len(data)
        super().data_received(data)
        if self._reading_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()

    def on_message_begin(self) -> None:
        self._reading_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._refuse_head()
        if self._refused:
            return
        self._reading_head = False
        self._head_bytes = 0
        self._set_receipt(self.body_timeout)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            self._cancel_receipt()
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        self._cancel_stall()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - the parser's caller gives it
        """The parser gave up."""
        self._refuse(400, "The request is not valid HTTP.", "invalid_http")

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: the request is answered over HTTP/1.1."""

    def _is_idle(self) -> bool:
        answered = self.cycle is None or self.cycle.response_complete
        return answered and self._receipt_deadline is None

    def _await_head(self) -> None:
        self._reading_head = True
        self._head_bytes = 0
        self._set_receipt(self.header_timeout)

    def _set_receipt(self, seconds: float) -> None:
        self._cancel_receipt()
        self._receipt_deadline = self.loop.call_later(seconds, self._receipt_overdue)

    def _cancel_receipt(self) -> None:
        if self._receipt_deadline is not None:
            self._receipt_deadline.cancel()
            self._receipt_deadline = None

    def _receipt_overdue(self) -> None:
        self._receipt_deadline = None
        if self.transport.is_closing():
            return
        if self._reading_head and self._head_bytes == 0:
            self.transport.close()
        else:
            self._refuse(408, "The request did not arrive in time.", "request_timeout")

    def _refuse_head(self) -> None:
        self._refuse(431, f"The request's head is larger than {MAX_HEAD_BYTES} bytes.", "header_too_large")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer without the application where no answer has begun, and close."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._cancel_receipt()
        cycle = self.cycle
        if self._reading_head:
            may_answer = cycle is None or cycle.response_complete
        else:
            may_answer = cycle is not None and not cycle.response_started
        if may_answer:
            body = msgspec.json.encode(ErrorResponse(Error(message, "invalid_request_error", None, code)))
            head = (
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
                f"x-request-id: {new_request_id()}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self._linger()

    def _linger(self) -> None:
        """Close once the peer has, or after a moment.

        Closing a socket with unread bytes resets the connection, and the peer may never see its answer.
        """
        self.flow.resume_reading()
        self.transport.write_eof()
        self._receipt_deadline = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _watch_stall(self) -> None:
        self._cancel_stall()
        unsent = self.transport.get_write_buffer_size()
        self._stall_deadline = self.loop.call_later(self.send_timeout, self._stalled, unsent)

    def _cancel_stall(self) -> None:
        if self._stall_deadline is not None:
            self._stall_deadline.cancel()
            self._stall_deadline = None

    def _stalled(self, unsent_before: int) -> None:
        """Nothing, or too little, was read for send_timeout: a slow reader is served, one that stopped is
        not.
        """
        self._stall_deadline = None
        if self.transport.get_write_buffer_size() < unsent_before:
            self._watch_stall()
        else:
            self.transport.abort()


def bounded_by(settings: Settings) -> type[BoundedHttpProtocol]:
    """The protocol with these settings' deadlines."""
    deadlines = {name: getattr(settings, name) for name in ("header_timeout", "body_timeout", "send_timeout")}
    return type("BoundedHttpProtocol", (BoundedHttpProtocol,), deadlines)


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
            connection.setsockopt(socket.IPPROTO_TCP, option, round(send_timeout * 1000))
