"""Engine processes without a model, for tests of what is around them."""

from __future__ import annotations

import os
import resource
import select
import socket
import time
from pathlib import Path

from reprise.ipc.messages import FromEngine, LoadFailed
from reprise.ipc.transport import MessageCodec


def send_and_end(exit_code: int, sock: socket.socket, _parent: int) -> None:
    """Say two things and end with that code, or by that signal where it is negative."""
    codec: MessageCodec[FromEngine] = MessageCodec(FromEngine)
    sock.sendall(codec.encode(LoadFailed("1")) + codec.encode(LoadFailed("2")))
    if exit_code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), -exit_code)
    os._exit(exit_code)


def end_with_a_message_unread(sock: socket.socket, parent: int) -> None:
    """Say two things once there is something to read, and end without reading it."""
    select.select([sock], [], [])
    send_and_end(0, sock, parent)


def wait(_sock: socket.socket, _parent: int) -> None:
    """Do nothing, for long."""
    time.sleep(600)


def mark_the_end(path: str, sock: socket.socket, _parent: int) -> None:
    """Wait for the end of file, and leave a file."""
    while sock.recv(1):
        pass
    Path(path).touch()
