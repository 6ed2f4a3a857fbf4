"""Server-sent events: the only importer of sse_starlette.

Importing it replaces `uvicorn.Server.handle_exit`, and by default it cuts every stream on SIGTERM. The drain
is `server.py`'s business, so that is switched off here; it also logs whole chunks at DEBUG, so its logger is
not let down there.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping

import msgspec
from sse_starlette import ServerSentEvent
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.types import Message, Send

from reprise.protocol.responses import ErrorResponse

AppStatus.enable_automatic_graceful_drain = False
logging.getLogger("sse_starlette.sse").setLevel(logging.INFO)

__all__ = ["DONE", "EventStream", "encode"]

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


_OTHER_LINE_ENDS = {character.encode(): f"\\u{ord(character):04x}".encode() for character in "\x85\u2028\u2029"}
"""Line ends that JSON leaves as they are, as JSON writes them otherwise."""


def encode(message: msgspec.Struct | ErrorResponse, *, event_id: bytes | None = None) -> bytes:
    """One event with a JSON object, which is one `data:` line: all that a client may take for a line's end is escaped.

    The id comes last: who has read it has read the data, even if he looks at lines and not at events.
    """
    data = _encoder.encode(message)
    for character, escaped in _OTHER_LINE_ENDS.items():
        data = data.replace(character, escaped)
    if event_id is None:
        return b"data: " + data + b"\n\n"
    return b"data: " + data + b"\nid: " + event_id + b"\n\n"


class EventStream(EventSourceResponse):
    """A response of prebuilt events.

    keep_alive_interval: seconds between comment lines, 0 for none. How long a send may take is the business of our
    HTTP protocol, which cuts a connection whose reader has stopped.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        headers: Mapping[str, str],
        keep_alive_interval: float,
    ) -> None:
        super().__init__(
            events,
            headers=headers,
            ping=keep_alive_interval,
            ping_message_factory=_keep_alive,
            sep="\n",
        )
        # The server knows whether the connection lives on.
        del self.headers["connection"]

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        # The base class's cancel scope, which is made even without a timeout, costs a seventh of what an event does.
        await send(message)


def _keep_alive() -> ServerSentEvent:
    return ServerSentEvent(comment="keep-alive", sep="\n")
