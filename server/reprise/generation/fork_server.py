"""The fork server that engine processes are children of, and a hold of such a child that needs no fork server."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from typing import Any, cast

PRELOAD = ("reprise.engine.preload",)
REPORT_SECONDS = 5.0
"""How long the fork server may take to say with which code a child ended."""
STOP_SECONDS = 5.0
POLL_SECONDS = 0.02
_UNSEEN = 255
"""multiprocessing's exit code of a process whose fork server is gone, be it alive or not."""

logger = logging.getLogger(__name__)

_context = multiprocessing.get_context("forkserver")


class Child:
    """A process of the fork server. It stays within reach when the fork server is gone."""

    def __init__(self, process: ForkServerProcess) -> None:
        self.pid = cast("int", process.pid)  # it was started
        self._process = process
        self._handle = _open_handle(self.pid)
        if self._handle is not None:
            self._close_handle = weakref.finalize(self, os.close, self._handle)

    def signal(self, number: signal.Signals) -> None:
        """No effect where the process is gone."""
        try:
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, number)
            elif self._process.exitcode in (None, _UNSEEN):
                os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def wait(self, seconds: float) -> bool:
        """Block until it has ended, for so long at most. Returns whether it has."""
        if self._handle is not None:
            return bool(connection.wait([self._handle], seconds))
        deadline = time.monotonic() + seconds
        self._process.join(seconds)
        while self._process.exitcode in (None, _UNSEEN):
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                break
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def close(self) -> int | None:
        """Let go of it once it has ended. Returns its exit code, negative for a signal; None where nobody saw it."""
        self._process.join(REPORT_SECONDS)
        if self._process.exitcode is None and self.wait(0):
            end_fork_server(f"it has not told of the end of process {self.pid}")
            self._process.join(REPORT_SECONDS)
        code = self._process.exitcode
        if self._handle is not None:
            self._close_handle()
        if code is not None:
            # Its pipes would stay open until the garbage collector comes by.
            self._process.close()
        return None if code == _UNSEEN else code


def start_fork_server() -> None:
    """Start the fork server unless it runs. Returns at once: it imports in its own time."""
    # Read when OpenMP loads, in the fork server: threads that wait by spinning starve the event loop, and each
    # other, on a machine whose cores are all in use.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _context.set_forkserver_preload([*PRELOAD])
    forkserver.ensure_running()


def end_fork_server(reason: str) -> None:
    """Kill the fork server, which hangs. Its children live on; the next `spawn` starts another."""
    logger.error("the fork server hangs and is killed: %s", reason)
    ending = threading.Thread(target=_end_fork_server, daemon=True)
    ending.start()
    ending.join(STOP_SECONDS)  # the kernel itself may hold it up


async def spawn(start_timeout: float, target: Callable[..., None], *args: object) -> Child:
    """A child of the fork server that runs `target`. Waits while the fork server imports; one that hangs is killed.

    Raises OSError or EOFError where there is none.
    """
    spawning = _in_thread(partial(_spawn, target, args))
    try:
        async with asyncio.timeout(start_timeout):
            return await asyncio.shield(spawning)
    except TimeoutError:
        reason = f"it has given no process in {start_timeout:g} seconds"
        await asyncio.to_thread(end_fork_server, reason)
        raise TimeoutError(reason) from None


def _end_fork_server() -> None:
    server: Any = forkserver._forkserver  # noqa: SLF001 # nothing public ends it
    pid = server._forkserver_pid  # noqa: SLF001 # as above
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        server._stop()  # noqa: SLF001 # as above


def _spawn(target: Callable[..., None], args: tuple[object, ...]) -> Child:
    start_fork_server()
    process = _context.Process(target=target, args=args, name="reprise-engine", daemon=True)
    process.start()
    return Child(process)


def _in_thread(function: Callable[[], Child]) -> asyncio.Future[Child]:
    """Call it in a thread that the interpreter's end does not wait for, as it does for those of `asyncio.to_thread`."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Child] = loop.create_future()
    future.add_done_callback(asyncio.Future.exception)  # asked for here: the caller may have gone on

    def call() -> None:
        try:
            settle = partial(future.set_result, function())
        except Exception as error:  # noqa: BLE001 # whoever awaits it gets it
            settle = partial(future.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            loop.call_soon_threadsafe(settle)

    threading.Thread(target=call, daemon=True).start()
    return future


def _open_handle(pid: int) -> int | None:
    """A descriptor that names this process alone, while its number may come to name another; None without such."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        # Another system than Linux, an old kernel, or the process is gone already.
        return None
