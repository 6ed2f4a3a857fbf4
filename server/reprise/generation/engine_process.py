"""One life of an engine process: started from the fork server, spoken to over a socket pair, ended for sure."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess

import msgspec

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

logger = logging.getLogger(__name__)

_context = multiprocessing.get_context("forkserver")


class EngineProcess:
    """`start` makes one; `end` must follow, whatever happens in between."""

    def __init__(self, process: ForkServerProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._process = process
        self.pid = process.pid
        self._reader = reader
        self._writer = writer
        self._codec: MessageCodec[FromEngine] = MessageCodec(FromEngine)
        self._frames = FrameDecoder()
        self._killed_here = False
        self._exit_code: int | None = None

    @classmethod
    async def start(cls, entry: EngineEntry) -> EngineProcess:
        """Raises OSError where there can be no further process."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        spawning = asyncio.ensure_future(asyncio.to_thread(_spawn, entry, theirs))
        # A thread cannot be cancelled: whatever becomes of this task, the socket is closed when it is done with it.
        spawning.add_done_callback(lambda _: theirs.close())
        try:
            process = await asyncio.shield(spawning)
        except BaseException:
            # The engine, if it still comes to life, sees end of file and ends.
            ours.close()
            raise
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, reader, writer)

    @property
    def was_killed(self) -> bool:
        """Whether a SIGKILL from elsewhere ended the process; known after `end`."""
        return self._exit_code == -signal.SIGKILL and not self._killed_here

    def send(self, message: msgspec.Struct) -> None:
        """No effect where the process is gone: `read` tells."""
        if not self._writer.is_closing():
            self._writer.write(self._codec.encode(message))

    async def read(self) -> list[FromEngine]:
        """At least one message; none at the end of the process's life. Raises ProtocolError."""
        messages: list[FromEngine] = []
        while not messages:
            try:
                data = await self._reader.read(READ_BYTES)
            except ConnectionError:
                return []
            if not data:
                return []
            messages = [self._codec.decode(frame) for frame in self._frames.feed(data)]
        return messages

    async def kill_hung(self) -> None:
        """Have it say on standard error where it hangs, as far as it can, and kill it."""
        self._killed_here = True
        for number in (signal.SIGCONT, STACKS_SIGNAL):
            self._signal(number)
        await asyncio.sleep(STACKS_SECONDS)
        self._signal(signal.SIGKILL)

    async def end(self) -> str:
        """Close the channel and see the process out. Returns how it ended: with which code, or by which signal."""
        self._writer.transport.abort()
        await asyncio.to_thread(self._process.join, EXIT_SECONDS)
        if self._process.exitcode is None:
            self._killed_here = True
            self._process.kill()
            await asyncio.to_thread(self._process.join, STOP_SECONDS)
        code = self._exit_code = self._process.exitcode
        if code is None:
            return f"not yet, {STOP_SECONDS:g} seconds after SIGKILL"
        # Its pipes would stay open until the garbage collector comes by.
        self._process.close()
        return f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"

    def _signal(self, number: signal.Signals) -> None:
        if self.pid is None or self._exit_code is not None or self._process.exitcode is not None:
            return
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            logger.debug("the engine process is gone before %s", number.name)


def start_fork_server() -> None:
    """Start the fork server unless it runs. Returns at once: it imports in its own time."""
    # Read when OpenMP loads, in the fork server: threads that wait by spinning starve the event loop, and each
    # other, on a machine whose cores are all in use.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _context.set_forkserver_preload(["reprise.engine.preload"])
    forkserver.ensure_running()


def _spawn(entry: EngineEntry, sock: socket.socket) -> ForkServerProcess:
    """A child of the fork server with one end of the socket pair. Blocks while the fork server imports."""
    start_fork_server()
    process = _context.Process(target=entry, args=(sock, os.getpid()), name="reprise-engine", daemon=True)
    process.start()
    return process
