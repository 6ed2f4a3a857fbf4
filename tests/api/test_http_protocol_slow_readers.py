"""How long a connection may stay, and a client take to read: with time and the socket in the test's hands, and over
real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import json
import random
import socket
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from reprise.api.http_protocol import LEAST_TAKEN_BYTES, MAX_HEAD_BYTES, BoundedHttpProtocol, bounded_by
from reprise.settings import Settings
from reprise.types import ChoiceDelta, FinishReason
from support.loopback import Loopback, Start, eventually
from support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
SEND_TIMEOUT = 60.0
LARGE = 20 * LEAST_TAKEN_BYTES

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Clock:
    """As much of an event loop as a protocol needs, with a time that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._timers: list[tuple[float, int, asyncio.Handle]] = []

    def call_later(self, seconds: float, callback: Callable[..., None], *args: object) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, asyncio.get_running_loop())
        heapq.heappush(self._timers, (self.now + seconds, next(self._order), handle))
        return handle

    def create_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(work)

    @property
    def pending(self) -> bool:
        return any(not handle.cancelled() for _, _, handle in self._timers)

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now, _, handle = heapq.heappop(self._timers)
            if not handle.cancelled():
                handle._run()
        self.now = end


class Transport(asyncio.Transport):
    """A socket that takes nothing by itself."""

    HIGH_WATER = 65536
    LOW_WATER = 16384

    def __init__(self, protocol: BoundedHttpProtocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.unsent = 0
        self.paused = self.closing = self.aborted = self.ended = False
        self.reading = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.ended
        self.unsent += len(data)
        if self.unsent > self.HIGH_WATER and not self.paused:
            self.paused = True
            self.protocol.pause_writing()

    def take(self, num_bytes: int) -> None:
        self.unsent -= num_bytes
        assert self.unsent >= 0
        if self.unsent <= self.LOW_WATER and self.paused:
            self.paused = False
            self.protocol.resume_writing()

    def take_all(self) -> None:
        self.take(self.unsent)

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.closing = self.aborted = True
        self.protocol.connection_lost(None)

    def close(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def write_eof(self) -> None:
        self.ended = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Connection:
    """One that asks an application which answers each request with a whole body, or with parts as they are given.

    It reads what is sent to /read first.
    """

    def __init__(self, *, request_timeout: float | None = None, idle_timeout: int = 10**6) -> None:
        settings = Settings(model="m", send_timeout=SEND_TIMEOUT, request_timeout=request_timeout)
        config = uvicorn.Config(
            self._app,
            interface="asgi3",
            ws="none",
            proxy_headers=False,
            log_config=None,
            timeout_keep_alive=idle_timeout,
        )
        self.clock = Clock()
        self.bodies: asyncio.Queue[tuple[bytes, bool] | None] = asyncio.Queue()
        """What is to be sent, and whether that is the answer's end; None where the application is to fail."""
        self.num_at_work = 0
        """Calls of the application that wait for nothing of the client."""
        protocol = bounded_by(settings)(config, ServerState(), {}, self.clock)  # type: ignore[arg-type]
        self.protocol = protocol
        self.transport = Transport(protocol)
        protocol.connection_made(self.transport)

    async def _app(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["path"] == "/read":
            while (await receive()).get("more_body"):
                pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        last = False
        while not last:
            self.num_at_work += 1
            answer = await self.bodies.get()
            self.num_at_work -= 1
            if answer is None:
                raise RuntimeError("The application is to fail.")
            body, last = answer
            await send({"type": "http.response.body", "body": body, "more_body": not last})

    async def ask(self, num_bytes: int = 0, *, complete: bool = True) -> None:
        """A request, and so much of its answer."""
        self.protocol.data_received(REQUEST)
        await self.answer(num_bytes, complete=complete)

    async def answer(self, num_bytes: int, *, complete: bool = True) -> None:
        self.bodies.put_nowait((b"x" * num_bytes, complete))
        await settle()

    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "amid"])
async def test_who_takes_less_than_the_least_is_cut_off(complete: bool) -> None:
    connection = Connection()
    await connection.ask(LARGE, complete=complete)
    for _ in range(3):
        connection.transport.take(LEAST_TAKEN_BYTES)
        connection.wait(SEND_TIMEOUT)
        assert not connection.transport.aborted
    connection.transport.take(LEAST_TAKEN_BYTES - 1)
    connection.wait(SEND_TIMEOUT)
    assert connection.transport.aborted


@pytest.mark.parametrize("error", [None, ConnectionResetError()], ids=["closed", "reset"])
async def test_a_connection_that_is_lost_leaves_no_timer(error: Exception | None) -> None:
    """Such as wait for its next request."""
    connection = Connection()
    await connection.ask(10)
    connection.transport.take_all()
    assert connection.clock.pending
    connection.protocol.connection_lost(error)
    assert not connection.clock.pending


async def test_a_byte_now_and_then_is_too_little() -> None:
    connection = Connection()
    await connection.ask(LARGE)
    for _ in range(10):
        connection.wait(SEND_TIMEOUT / 10)
        connection.transport.take(1)
    assert connection.transport.aborted


async def test_who_takes_what_there_is_stays() -> None:
    connection = Connection()
    await connection.ask(LARGE, complete=False)
    connection.transport.take_all()
    connection.wait(10 * SEND_TIMEOUT)
    await connection.answer(10)
    connection.transport.take_all()
    connection.wait(10 * SEND_TIMEOUT)
    assert not connection.transport.aborted


@pytest.mark.parametrize("rest", [1, 1000, Transport.LOW_WATER])
async def test_the_rest_of_an_answer_has_its_time_too(rest: int) -> None:
    """Of one that never filled the buffer, and of one that did."""
    for size in (rest, LARGE):
        connection = Connection()
        await connection.ask(size)
        connection.transport.take(connection.transport.unsent - rest)
        connection.wait(SEND_TIMEOUT - 1)
        assert not connection.transport.aborted
        connection.wait(SEND_TIMEOUT)
        assert connection.transport.aborted


async def test_an_answer_that_closes_the_connection_has_it_too() -> None:
    connection = Connection()
    connection.protocol.data_received(REQUEST.replace(b"Host", b"Connection: close\r\nHost"))
    await connection.answer(LARGE)
    assert connection.transport.is_closing()
    connection.wait(SEND_TIMEOUT)
    assert connection.transport.aborted


async def test_what_is_written_meanwhile_is_not_held_against_the_reader() -> None:
    """It has taken all of the first answer, and the second one's beginning waits to be sent."""
    connection = Connection()
    await connection.ask(1000)
    connection.wait(SEND_TIMEOUT / 2)
    connection.transport.take_all()
    await connection.ask(2000, complete=False)
    connection.wait(SEND_TIMEOUT / 2)
    assert not connection.transport.aborted


async def test_the_time_of_a_request_ends_with_the_last_byte_of_its_answer() -> None:
    connection = Connection(request_timeout=2.5 * SEND_TIMEOUT)
    await connection.ask(LARGE)
    for _ in range(2):
        connection.transport.take(LEAST_TAKEN_BYTES)
        connection.wait(SEND_TIMEOUT)
    connection.transport.take(LEAST_TAKEN_BYTES)
    connection.wait(SEND_TIMEOUT / 2 - 1)
    assert not connection.transport.aborted
    connection.wait(1)
    assert connection.transport.aborted


async def test_what_the_application_still_does_is_its_own_business() -> None:
    """Only it can say that its time is over; then what it says has to be taken."""
    connection = Connection(request_timeout=10)
    await connection.ask(100, complete=False)
    connection.transport.take_all()
    connection.wait(10)
    assert not connection.transport.aborted
    await connection.answer(100, complete=False)
    connection.wait(2)
    assert connection.transport.aborted


async def test_each_request_has_its_own_time() -> None:
    connection = Connection(request_timeout=10)
    for _ in range(3):
        await connection.ask(100)
        connection.wait(6)
        connection.transport.take_all()
    connection.wait(100)
    assert not connection.transport.aborted


POST = "POST {} HTTP/1.1\r\nHost: localhost\r\n{}\r\n"
PARTS = [
    REQUEST,
    REQUEST.replace(b"Host", b"Connection: close\r\nHost"),
    *[POST.format(path, "Content-Length: 3\r\n").encode() + b"abc" for path in ("/", "/read")],
    *[
        POST.format(path, "Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n").encode() + body
        for path in ("/", "/read")
        for body in (b"3\r\nabc\r\n0\r\n\r\n", b"no number\r\n")
    ],
    POST.format("/read", "Content-Length: 100000\r\n").encode() + b"x" * 100_000,
    b"\r\n",
    b"garbage\r\n\r\n",
]
WEIGHTS = [8, 1, 4, 4, 2, 2, 1, 1, 2, 2, 1]


class Course:
    """A random course of a connection: what its client sends and takes, its application does, and time."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.connection = Connection(idle_timeout=75)
        sent = b"".join(self._random.choices(PARTS, WEIGHTS, k=self._random.randint(1, 5)))
        ends = sorted({*self._random.choices(range(1, len(sent) + 1), k=6), *self._ends_of_lines(sent)})
        self._pieces = [sent[start:end] for start, end in itertools.pairwise([0, *ends])]

    def _ends_of_lines(self, sent: bytes) -> list[int]:
        ends = [index + 2 for index in range(len(sent)) if sent[index : index + 2] == b"\r\n"]
        return self._random.sample(ends, k=min(len(ends), 2))

    @property
    def over(self) -> bool:
        transport = self.connection.transport
        return transport.aborted or (transport.closing and not transport.unsent)

    async def step(self) -> None:
        transport = self.connection.transport
        match self._random.randrange(4):
            case 0 if self._pieces and transport.reading and not transport.closing:
                self.connection.protocol.data_received(self._pieces.pop(0))
            case 1 if self.connection.num_at_work:
                self.connection.bodies.put_nowait(
                    self._random.choice([(b"x" * 10, True), (b"x" * 10, False), (b"x" * LARGE, True), None])
                )
            case 2:
                transport.take(self._random.choice([transport.unsent, transport.unsent // 2]))
            case 3:
                self.connection.wait(self._random.choice([1, 9, 59]))
        await settle()

    async def fall_silent(self) -> None:
        """The client does nothing more, the application all that it has to."""
        for _ in range(30):
            for _ in range(self.connection.num_at_work):
                self.connection.bodies.put_nowait((b"x", True))
            await settle()
            self.connection.wait(SEND_TIMEOUT)
            await settle()


@pytest.mark.parametrize("seed", range(400))
async def test_an_open_connection_has_a_timer_or_an_application_that_answers(seed: int) -> None:
    course = Course(seed)
    for _ in range(40):
        if course.over:
            break
        assert course.connection.clock.pending or course.connection.num_at_work
        await course.step()
    else:
        await course.fall_silent()
        assert course.over
    course.connection.protocol.connection_lost(None)
    for _ in range(course.connection.num_at_work):
        course.connection.bodies.put_nowait((b"", True))
    await settle()


async def test_a_body_that_follows_its_answer_makes_the_connection_idle() -> None:
    connection = Connection(idle_timeout=75)
    connection.protocol.data_received(POST.format("/", "Content-Length: 1\r\n").encode())
    await connection.answer(10)
    connection.transport.take_all()
    connection.wait(50)
    connection.protocol.data_received(b"x")
    connection.wait(74)
    assert not connection.transport.closing
    connection.wait(1)
    assert connection.transport.closing


async def test_a_head_that_begins_behind_an_answer_is_counted_from_its_first_byte() -> None:
    connection = Connection()
    await connection.ask(10, complete=False)
    connection.protocol.data_received(b"GET /" + b"x" * (MAX_HEAD_BYTES - 100))
    connection.wait(SEND_TIMEOUT)
    await connection.answer(10)
    connection.transport.take_all()
    connection.protocol.data_received(b"x" * 100)
    assert connection.transport.ended


async def test_an_answer_that_its_application_fails_amid_has_its_time_too() -> None:
    connection = Connection()
    await connection.ask(1000, complete=False)
    connection.bodies.put_nowait(None)
    await settle()
    assert connection.transport.closing
    connection.wait(SEND_TIMEOUT - 1)
    assert not connection.transport.aborted
    connection.wait(1)
    assert connection.transport.aborted


def raw_request(body: dict[str, Any]) -> bytes:
    data = json.dumps({"prompt": "a", **body}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def connect_slowly(server: Loopback) -> socket.socket:
    """A connection with a small buffer at the client's end, and by its small segments at the server's end too."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", server.port))
    return connection


def large_answer(engine: ScriptedEngine) -> None:
    """Megabytes, and the end."""
    deltas = [ChoiceDelta(index=0, text="x" * 65536, token_ids=[5]) for _ in range(100)]
    engine.enqueue([deltas, ChoiceDelta(index=0, finish_reason=FinishReason.STOP)])


async def test_a_reader_that_trickles_is_cut_off(start: Start, engine: ScriptedEngine) -> None:
    """It takes something in every second, but less than it has to."""
    large_answer(engine)
    async with start(send_timeout=1, keep_alive_interval=0) as server:
        loop, connection = asyncio.get_running_loop(), await connect_slowly(server)
        await loop.sock_sendall(connection, raw_request({"stream": True}))
        received = 0
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(10):
                while part := await loop.sock_recv(connection, 1000):
                    received += len(part)
                    await asyncio.sleep(1000 / (0.7 * LEAST_TAKEN_BYTES))
        connection.close()
        assert received
        await eventually(lambda: server.app.state.service.admission.num_reserved == 0)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_steady_reader_of_a_large_answer_stays(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """As of a proxy on the same host: the kernel has taken megabytes and takes no more before a third is read."""

    async def answer(_: object, __: object, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 16 * 1024**2})

    async def read() -> None:
        config = uvicorn.Config(answer, interface="asgi3", ws="none", proxy_headers=False, log_config=None)
        state, loop = ServerState(), asyncio.get_running_loop()
        protocol = bounded_by(Settings(model="m", send_timeout=2))
        server = await loop.create_server(lambda: protocol(config, state, {}), "127.0.0.1", 0)
        async with server, asyncio.timeout(30):
            with socket.socket() as connection:
                connection.setblocking(False)
                await loop.sock_connect(connection, server.sockets[0].getsockname())
                await loop.sock_sendall(connection, REQUEST)
                received, began = 0, loop.time()
                while loop.time() < began + 5:
                    received += len(await loop.sock_recv(connection, 4096))
                    await asyncio.sleep(began + received / (10 * LEAST_TAKEN_BYTES) - loop.time())
                assert state.connections
            await eventually(lambda: not state.connections)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(read())


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_request_takes_no_longer_than_it_may_however_it_is_read(
    start: Start, engine: ScriptedEngine, stream: bool
) -> None:
    large_answer(engine)
    async with start(request_timeout=0.5, keep_alive_interval=0) as server:
        connection = await connect_slowly(server)
        await asyncio.get_running_loop().sock_sendall(connection, raw_request({"stream": stream}))
        await eventually(lambda: server.server.connections)
        await eventually(lambda: not server.server.connections)
        await eventually(lambda: server.app.state.service.admission.num_reserved == 0)
        connection.close()


async def test_who_reads_slowly_what_is_complete_keeps_nobody_out(start: Start, engine: ScriptedEngine) -> None:
    """As many as there are places; beyond that they take those of others."""
    async with start(max_num_seqs=1, max_waiting_seqs=1, keep_alive_interval=0) as server:
        connections, admission = [], server.app.state.service.admission
        for number in range(1, 4):
            large_answer(engine)
            connections.append(await connect_slowly(server))
            await asyncio.get_running_loop().sock_sendall(connections[-1], raw_request({"stream": True}))
            await eventually(lambda number=number: [one.finished for one in engine.streams] == [True] * number)
        assert (await server.post("/v1/completions", {"prompt": "a"})).status_code == 200
        assert (await server.post("/v1/completions", {"prompt": "a", "n": 2})).status_code == 429
        for connection in connections:
            connection.close()
        await eventually(lambda: admission.num_reserved == 0)
        assert (await server.post("/v1/completions", {"prompt": "a", "n": 2})).status_code == 200
