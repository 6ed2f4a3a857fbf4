"""The function that a forked engine process runs. Here, so that the API process imports nothing of the engine."""

from __future__ import annotations

import socket


def run(sock: socket.socket, parent: int) -> None:
    from reprise.engine.process import run_forked

    run_forked(sock, parent)
