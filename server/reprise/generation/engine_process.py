"""One life of an engine process: started from the fork server, spoken to over a socket pair, ended for sure."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from functools import partial

import msgspec

from reprise.generation.fork_server import Child, spawn
from reprise.ipc.messages import FromEngine
from reprise.ipc.transport import FrameDecoder, MessageCodec

READ_BYTES = 1024 * 1024
EXIT_SECONDS = 0.5
"""How long a process whose channel is closed may take to exit by itself, so that its own exit code is seen."""
STOP_SECONDS = 5.0
STACKS_SECONDS = 0.5
STACKS_SIGNAL = signal.SIGUSR1
"""Asks the engine for the stacks of its threads, on standard error."""

EngineEntry = Callable[[socket.socket, int], None]
"""What the process runs, with its end of the channel and this process's id; importable by name in the child."""


class _Reader(asyncio.StreamReader):
    """What came before the channel broke is read in any case; asyncio's own forgets it."""

    def set_exception(self, exc: Exception) -> None:  # noqa: ARG002 # asyncio's signature
        self.feed_eof()


class EngineProcess:
    """`start` makes one; `end` must follow, whatever happens in between."""

    def __init__(
        self, child: Child, channel: socket.socket, reader: asyncio.StreamReader, transport: asyncio.WriteTransport
    ) -> None:
        """channel: a duplicate of the transport's socket, which stays when the transport has closed its own."""
        self._child = child
        self.pid = child.pid
        self._channel = channel
        self._reader = reader
        self._transport = transport
        self._codec: MessageCodec[FromEngine] = MessageCodec(FromEngine)
        self._frames = FrameDecoder()
        self._killed_here = False
        self._exit_code: int | None = None

    @classmethod
    async def start(cls, entry: EngineEntry, start_timeout: float) -> EngineProcess:
        """Raises OSError or EOFError where there is no further process, TimeoutError after `start_timeout` seconds."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        spawning = asyncio.ensure_future(spawn(start_timeout, entry, theirs, os.getpid()))
        # Its thread cannot be cancelled: whatever becomes of this task, the socket is closed when it is done with it.
        spawning.add_done_callback(partial(_spawned, theirs))
        try:
            child = await asyncio.shield(spawning)
        except BaseException:
            # The engine, if it still comes to life, sees end of file and ends.
            ours.close()
            raise
        reader, channel = _Reader(), ours.dup()
        channel.setblocking(False)  # noqa: FBT003 # the method has no name for it
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_unix_connection(lambda: asyncio.StreamReaderProtocol(reader), sock=ours)
        return cls(child, channel, reader, transport)

    @property
    def was_killed(self) -> bool:
        """Whether a SIGKILL from elsewhere ended the process, or may have, unseen; known after `end`."""
        return self._exit_code in (-signal.SIGKILL, None) and not self._killed_here

    def send(self, message: msgspec.Struct) -> None:
        """No effect where the process is gone: `read` tells."""
        if not self._transport.is_closing():
            self._transport.write(self._codec.encode(message))

    async def read(self) -> list[FromEngine]:
        """At least one message; none at the end of the process's life. Raises ProtocolError."""
        messages: list[FromEngine] = []
        while not messages:
            data = await self._reader.read(READ_BYTES) or self._left_unread()
            if not data:
                return []
            messages = [self._codec.decode(frame) for frame in self._frames.feed(data)]
        return messages

    def _left_unread(self) -> bytes:
        """Its last words, where the transport gave up reading since nobody could be written to any more."""
        try:
            return self._channel.recv(READ_BYTES)
        except OSError:
            return b""

    async def kill_hung(self) -> None:
        """Have it say on standard error where it hangs, as far as it can, and kill it."""
        self._killed_here = True
        for number in (signal.SIGCONT, STACKS_SIGNAL):
            self._child.signal(number)
        await asyncio.sleep(STACKS_SECONDS)
        self._child.signal(signal.SIGKILL)

    async def end(self) -> str:
        """Close the channel and see the process out. Returns how it ended: with which code, or by which signal."""
        self._transport.abort()
        self._channel.close()
        ended = await asyncio.to_thread(self._child.wait, EXIT_SECONDS)
        if not ended:
            self._killed_here = True
            self._child.signal(signal.SIGKILL)
            ended = await asyncio.to_thread(self._child.wait, STOP_SECONDS)
        code = self._exit_code = await asyncio.to_thread(self._child.close)
        if not ended:
            return f"not yet, {STOP_SECONDS:g} seconds after SIGKILL"
        if code is None:
            return "unseen by its fork server"
        return f"with exit code {code}" if code >= 0 else f"by {_signal_name(-code)}"


def _signal_name(number: int) -> str:
    """Those of real time have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _spawned(sock: socket.socket, spawning: asyncio.Task[Child]) -> None:
    sock.close()
    if not spawning.cancelled():
        spawning.exception()  # asked for here: the caller may have gone on
