"""Start `reprise serve` on a free port, wait until it is ready, stop it."""

from __future__ import annotations

import atexit
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY_TIMEOUT = 300.0
STOP_TIMEOUT = 60.0
PORTS = range(20000, 30000)
"""Below those that systems give to clients."""


@dataclass
class LocalServer:
    """A server process of this machine."""

    process: subprocess.Popen[bytes]
    base_url: str
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def wait_until_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait for /ready. Raises RuntimeError with the log where the server ends before, or takes longer."""
        self.wait_for("/ready", timeout)

    def wait_for(self, path: str, timeout: float = READY_TIMEOUT, *, interval: float = 0.05) -> None:
        """Wait until a path answers 200. Raises RuntimeError as `wait_until_ready`."""
        deadline = time.monotonic() + timeout
        while not self._answers(path):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with code {self.process.returncode}:\n{self.log}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not ready after {timeout:g} s:\n{self.log}")
            time.sleep(interval)

    def stop(self, timeout: float = STOP_TIMEOUT) -> int:
        """Ask the process to end, kill it if it does not. Returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(self.base_url + path, timeout=5) as response:  # noqa: S310 # our own address
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def free_port(ports: Sequence[int] = PORTS) -> int:
    """A port that nobody listens on, and that no other call here or in another process is given while this one lives.

    A server listens seconds after it was given its port: until then the system would give the same one to others, and
    whoever asks there would be answered by them. Raises RuntimeError where none of these ports is free, and OSError.
    """
    for port in random.sample(ports, len(ports)):
        # The ports of UDP stand beside those of TCP, and a socket that holds one ends with its process.
        claim = socket.socket(type=socket.SOCK_DGRAM)
        try:
            claim.bind(("127.0.0.1", port))
            socket.create_server(("127.0.0.1", port)).close()
        except OSError as error:
            claim.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            atexit.register(claim.close)
            return port
    raise RuntimeError(f"no port of {ports[0]} to {ports[-1]} is free")


def start_server(
    *arguments: str,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
    port: int | None = None,
    module: str = "reprise.cli",
) -> LocalServer:
    """Start `reprise serve` with these arguments; settings in this process's own environment do not count.

    module: what is run in its place, with the same command line.
    """
    port = port or free_port()
    log_path = Path(tempfile.mkstemp(prefix="reprise-", suffix=".log", dir=directory)[1])
    variables = {name: value for name, value in os.environ.items() if not name.startswith("REPRISE_")}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "serve", *arguments, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables | dict(environ or {}),
        )
    return LocalServer(process, f"http://127.0.0.1:{port}", log_path)


@contextmanager
def running_server(
    *arguments: str,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
    module: str = "reprise.cli",
) -> Iterator[LocalServer]:
    """A server that is ready; it is stopped at the end."""
    server = start_server(*arguments, environ=environ, directory=directory, module=module)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
        if directory is None:
            server.log_path.unlink()
