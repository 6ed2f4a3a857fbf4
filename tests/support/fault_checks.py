"""A server that faults happen to, and what must hold of it when they are over."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx

from benchmarks.local_server import LocalServer
from support.engine_processes import descriptors, engine_pids
from support.live_api import LiveApi

FLAGS = ("--served-model-name", "m", "--num-threads", "1", "--max-model-len", "1024", "--kv-cache-memory", "32MiB")


class Watched:
    """A server, a client of it, and how much it had open when nothing went on."""

    def __init__(self, server: LocalServer, *, asks: bool = True) -> None:
        """Waits until it is ready. asks: and until it has answered a request."""
        server.wait_until_ready()
        self.server = server
        self.api = LiveApi(server)
        if asks:
            self.api.complete("a", max_tokens=1)
            self.close()
            self.api = LiveApi(server)
        self._descriptors = descriptors(server.process.pid)

    @property
    def client(self) -> httpx.Client:
        return self.api.client

    @property
    def engine(self) -> int:
        """The id of the engine's process."""
        (pid,) = engine_pids(self.server)
        return pid

    def count(self, name: str) -> int:
        """A counter of /metrics, without `reprise_` and `_total`."""
        return int(self.api.metrics()[f"{name}_total"])

    def readiness_in_recovery(self) -> dict[str, str]:
        """What /ready says while it says no; waits until it has done so, and says yes again."""
        found: dict[str, str] = {}

        def is_ready_again() -> bool:
            response = self.client.get("/ready")
            assert response.status_code in (200, 503)
            found.update(response.json() if response.status_code == 503 else {})
            return response.status_code == 200 and bool(found)

        until(is_ready_again)
        return found

    def close(self) -> None:
        """Of the client."""
        self.api.client.close()

    def assert_clean(self) -> None:
        """Ready; nothing runs, waits or holds blocks; one engine process; nothing left open."""
        self.api.wait_idle()
        until(lambda: self.api.get("/ready").status_code == 200)
        assert len(engine_pids(self.server)) == 1
        self.close()
        self.api = LiveApi(self.server)
        pid, before = self.server.process.pid, self._descriptors
        until(lambda: len(descriptors(pid)) <= len(before), lambda: (sorted(before), sorted(descriptors(pid))))


def until(condition: Callable[[], bool], state: Callable[[], object] = lambda: "", seconds: float = 30.0) -> None:
    """Wait until it holds; where that takes longer, fail and tell the state."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, state()
        time.sleep(0.005)
