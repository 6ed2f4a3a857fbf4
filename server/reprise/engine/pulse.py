"""The thread by which the API process knows that the engine process lives, and the other way round."""

from __future__ import annotations

import os
import threading
from typing import Any

from reprise.ipc.messages import Heartbeat
from reprise.ipc.transport import BlockingConnection, ConnectionClosed

HEARTBEAT_SECONDS = 1.0


class Pulse(threading.Thread):
    """Sends a heartbeat every second, whatever the main thread does, and ends the process when its peer is gone.

    Ends it at once: in the middle of a step there is nobody left to compute it for.
    """

    def __init__(self, connection: BlockingConnection[Any]) -> None:
        super().__init__(name="pulse", daemon=True)
        self._connection = connection

    def run(self) -> None:
        try:
            while not self._connection.peer_is_gone(HEARTBEAT_SECONDS):
                self._connection.send(Heartbeat())
        except ConnectionClosed:
            pass
        os._exit(0)
