"""Length-prefixed msgpack frames over a stream socket: a pure decoder and the engine's blocking connection.

A frame is a 4-byte big-endian length and that many bytes of msgpack. A peer that dies is seen as end of file.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from typing import Generic, TypeVar

import msgspec

MAX_FRAME_BYTES = 256 * 1024 * 1024
_HEADER_BYTES = 4
_READ_BYTES = 1024 * 1024

T = TypeVar("T")


class ProtocolError(Exception):
    """The peer sent something that is no frame or no message; the channel cannot be trusted any more."""


class ConnectionClosed(Exception):  # noqa: N818 # an event, not a fault
    """The peer is gone."""


class FrameDecoder:
    """Bytes in, whole frames out. `feed` raises ProtocolError at a length above the cap, before allocating."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        self._buffer += data
        frames: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= _HEADER_BYTES:
            length = int.from_bytes(self._buffer[start : start + _HEADER_BYTES], "big")
            if length > self._max_frame_bytes:
                raise ProtocolError(f"a frame of {length} bytes is above the cap of {self._max_frame_bytes}")
            end = start + _HEADER_BYTES + length
            if len(self._buffer) < end:
                break
            frames.append(bytes(self._buffer[start + _HEADER_BYTES : end]))
            start = end
        del self._buffer[:start]
        return frames


class MessageCodec(Generic[T]):
    """Messages of one direction to frames and back. `decode` raises ProtocolError."""

    def __init__(self, union: object) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    def encode(self, message: msgspec.Struct) -> bytes:
        payload = self._encoder.encode(message)
        if len(payload) > MAX_FRAME_BYTES:
            raise ProtocolError(f"a message of {len(payload)} bytes is above the cap of {MAX_FRAME_BYTES}")
        return len(payload).to_bytes(_HEADER_BYTES, "big") + payload

    def decode(self, frame: bytes) -> T:
        try:
            return self._decoder.decode(frame)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"a frame that is no message: {error}") from error


class BlockingConnection(Generic[T]):
    """The engine's end: blocking sends, receives with a timeout. `T` is the union of messages received.

    Any thread may send; one alone receives, and one alone waits for the peer's end.
    """

    def __init__(self, sock: socket.socket, receives: object) -> None:
        self._socket = sock
        self._socket.settimeout(None)
        self._codec: MessageCodec[T] = MessageCodec(receives)
        self._frames = FrameDecoder()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._hang_up = select.poll()
        self._hang_up.register(sock, 0)  # a hang-up is reported whether asked for or not
        self._sending = threading.Lock()

    def send(self, message: msgspec.Struct) -> None:
        frame = self._codec.encode(message)
        try:
            with self._sending:
                self._socket.sendall(frame)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionClosed from error

    def receive(self, timeout: float) -> list[T]:
        """All messages that are there, waiting at most `timeout` seconds for the first. Empty on time-out."""
        messages: list[T] = []
        deadline = time.monotonic() + timeout
        while not messages:
            remaining = max(0.0, deadline - time.monotonic())
            if not self._poll.poll(remaining * 1000):
                break
            try:
                data = self._socket.recv(_READ_BYTES)
            except ConnectionResetError as error:
                raise ConnectionClosed from error
            if not data:
                raise ConnectionClosed
            messages.extend(self._codec.decode(frame) for frame in self._frames.feed(data))
        return messages

    def peer_is_gone(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds for the peer to close its end, whatever is still to be read or sent."""
        return bool(self._hang_up.poll(timeout * 1000))

    def close(self) -> None:
        self._socket.close()
