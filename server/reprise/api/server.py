"""uvicorn around the app, with signals and shutdown in our own hands.

On the first SIGTERM or SIGINT `/ready` turns 503 and new work is refused, while what runs may finish for
drain_timeout seconds; what is left then is told of it in its own stream. A second signal ends everything now.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator

import uvicorn
from fastapi import FastAPI

from reprise.api.http_protocol import bounded_by
from reprise.api.service import SHUTTING_DOWN, Service
from reprise.errors import ConfigError, UnavailableError
from reprise.settings import Settings

FAREWELL_SECONDS = 5
"""For the last bytes of answers to leave, and connections to close."""
LAST_WORD_SECONDS = 0.1
"""The same after a second signal."""
_BACKLOG = 2048
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

logger = logging.getLogger(__name__)


def bind(settings: Settings) -> list[socket.socket]:
    """Listening sockets at all addresses of the settings' host that this machine has.

    Raises ConfigError where they cannot be had.
    """
    host, port = settings.host, settings.port
    listeners: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, _, _, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            # Of `::` alone: a socket for all of IPv6 takes IPv4 as well, unless it is told not to.
            both = address[0] == "::" and socket.has_dualstack_ipv6()
            try:
                listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=both)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                # `localhost` may name an address of IPv6 on a machine without.
                missing = error
                continue
            listener.setblocking(False)  # noqa: FBT003 - the standard library names no argument
            listeners.append(listener)
        if missing is not None and not listeners:
            raise missing
    except OSError as error:
        for listener in listeners:
            listener.close()
        # A socket's own words name the address again.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}; choose another --port or --host") from error
    return listeners


class Server:
    """One run of the HTTP server. `request_shutdown` may be called from a signal handler, once or twice."""

    def __init__(self, app: FastAPI, settings: Settings, listeners: list[socket.socket]) -> None:
        self._service: Service = app.state.service
        self._drain_timeout = settings.drain_timeout
        self._listeners = listeners
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                http=bounded_by(settings),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=math.ceil(settings.idle_timeout),
                timeout_graceful_shutdown=FAREWELL_SECONDS,
                proxy_headers=False,
            )
        )
        self._asked = asyncio.Event()
        self._insisted = asyncio.Event()
        self._num_cut = 0

    async def run(self, on_started: Callable[[], None]) -> int:
        """Serve until shutdown is asked for. Exit code: 0 if all that ran could finish, else 1.

        Cancelled, it ends as soon as open requests have ended, or FAREWELL_SECONDS later.
        """
        self._uvicorn.on_started = on_started
        stopping = asyncio.create_task(self._stop_when_asked())
        serving = asyncio.create_task(self._uvicorn.serve(self._listeners))
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            # Cancelled in its midst, uvicorn reports its own lifespan as an error.
            self._uvicorn.should_exit = True
            await serving
            raise
        finally:
            stopping.cancel()
        return 1 if self._num_cut else 0

    @property
    def connections(self) -> Collection[object]:
        """Those that are open, idle ones too."""
        return self._uvicorn.server_state.connections

    def request_shutdown(self) -> None:
        """The first call begins the drain, the second ends it."""
        if self._asked.is_set():
            self._insisted.set()
        self._asked.set()

    async def _stop_when_asked(self) -> None:
        await self._asked.wait()
        running = self._service.generations.read_now
        self._service.begin_drain()
        logger.info("shutting down: %s", count_requests(len(running), "running"))
        await self._drain()
        self._num_cut = len(running) + self._service.token_threads.num_admitted
        if running:
            logger.warning("shutting down: %s", count_requests(len(running), "cut off"))
            self._service.generations.fail_read(UnavailableError(SHUTTING_DOWN))
        self._uvicorn.should_exit = True
        await self._insisted.wait()
        while True:
            await asyncio.sleep(LAST_WORD_SECONDS)
            self._uvicorn.abort_connections()

    async def _drain(self) -> None:
        """Wait until nothing runs, the time is up, or somebody insists."""
        waits = [asyncio.create_task(wait) for wait in (self._idle(), self._insisted.wait())]
        await asyncio.wait(waits, timeout=self._drain_timeout, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _idle(self) -> None:
        await self._service.generations.idle.wait()
        while self._service.token_threads.num_admitted:  # noqa: ASYNC110 # few, and looked at while draining alone
            await asyncio.sleep(LAST_WORD_SECONDS)


def count_requests(number: int, state: str) -> str:
    """For a log line: '2 requests are running'."""
    return f"1 request is {state}" if number == 1 else f"{number} requests are {state}"


class _Uvicorn(uvicorn.Server):
    on_started: Callable[[], None]

    def abort_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to whoever runs us."""
        yield


@contextlib.contextmanager
def _shutdown_on_signals(server: Server) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    signals = [signal.SIGTERM, signal.SIGINT]
    if threading.current_thread() is not threading.main_thread():
        signals = []
    for number in signals:
        loop.add_signal_handler(number, server.request_shutdown)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def serve(
    app: FastAPI,
    settings: Settings,
    *,
    on_started: Callable[[], None],
    listeners: list[socket.socket] | None = None,
) -> int:
    """Serve an app of `create_app` until SIGTERM or SIGINT; the exit code is 0 if nothing was cut off.

    on_started: called when connections are accepted. listeners: from `bind`, for who wants to know of a taken
    port before loading a model; else they are bound here. Raises ConfigError.
    """
    server = Server(app, settings, listeners or bind(settings))
    # What is loaded now stays. Walking all of it in a full collection stops every stream for 150 ms.
    gc.collect()
    gc.freeze()
    gc.enable()
    with _shutdown_on_signals(server):
        return await server.run(on_started)
