"""The fork server of this process, which nothing of multiprocessing's own shows."""

from __future__ import annotations

import os
import signal
from multiprocessing import forkserver
from typing import Any


def fork_server_pid() -> int | None:
    """None before the first one is started."""
    server: Any = forkserver._forkserver
    pid: int | None = server._forkserver_pid
    return pid


def kill_fork_server() -> None:
    """As somebody else would: multiprocessing finds out when it next needs one. No effect where there is none."""
    pid = fork_server_pid()
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def stop_fork_server() -> int:
    """As it may stand still for ever. Returns its id."""
    pid = fork_server_pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    return pid
