"""The fork server that engine processes are children of, and a hold of such a child that needs no fork server."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from typing import cast

PRELOAD = ("reprise.engine.preload",)
REPORT_SECONDS = 5.0
"""How long the fork server may take to say with which code a child ended."""
POLL_SECONDS = 0.02
_UNSEEN = 255
"""multiprocessing's exit code of a process whose fork server is gone, be it alive or not."""

_context = multiprocessing.get_context("forkserver")


class Child:
    """A process of the fork server. It stays within reach when the fork server is gone."""

    def __init__(self, process: ForkServerProcess) -> None:
        self.pid = cast("int", process.pid)  # it was started
        self._process = process
        self._handle = _open_handle(self.pid)

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
        code = self._process.exitcode
        if self._handle is not None:
            os.close(self._handle)
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


def spawn(target: Callable[..., None], *args: object) -> Child:
    """A child of the fork server that runs `target`. Blocks while the fork server imports."""
    start_fork_server()
    process = _context.Process(target=target, args=args, name="reprise-engine", daemon=True)
    process.start()
    return Child(process)


def _open_handle(pid: int) -> int | None:
    """A descriptor that names this process alone, while its number may come to name another; None without such."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        # Another system than Linux, an old kernel, or the process is gone already.
        return None
