"""A TCP proxy whose connections break when a test says so."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit


class CuttingProxy:
    """Listens on a port of its own. Of the n-th connection that sends a request, the first `cuts[n]` bytes of the
    answers come through, then it is reset; None is all, and so are those beyond the list.
    """

    def __init__(self, base_url: str, cuts: Iterable[int | None]) -> None:
        self._server = ("127.0.0.1", urlsplit(base_url).port or 0)
        self._cuts = iter(cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []
        self.num_cut = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def start(self) -> None:
        self._in_thread(self._accept)

    def close(self) -> None:
        # Closing alone does not wake a thread that waits in accept.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for connection in self._connections:
            connection.close()

    def _in_thread(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]  # of any signature
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            self._connections += [client, server]
            cut = next(self._cuts, None)
            self._in_thread(self._requests, client, server)
            self._in_thread(self._answers, server, client, cut)

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
            server.shutdown(socket.SHUT_RDWR)

    def _answers(self, server: socket.socket, client: socket.socket, cut: int | None) -> None:
        left = cut
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if left is not None and len(data) >= left:
                    client.sendall(data[:left])
                    self.num_cut += 1
                    self._reset(client, server)
                    return
                left = None if left is None else left - len(data)
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)

    def _reset(self, client: socket.socket, server: socket.socket) -> None:
        """As a cable that is cut looks to both ends in the end."""
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for connection in (client, server):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def cutting(base_url: str, cuts: Iterable[int | None]) -> Iterator[CuttingProxy]:
    """A proxy that runs until the block ends."""
    proxy = CuttingProxy(base_url, cuts)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.close()
