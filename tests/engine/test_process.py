"""The engine process, on an inherited socket: what it says, and how it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from benchmarks.processes import kilobytes
from reprise.engine import process as engine_process
from reprise.engine.process import EXIT_FAILED
from reprise.ipc.messages import Add, EngineConfig, FromEngine, Heartbeat, Ready, Start, StepOutput, ToEngine
from reprise.ipc.transport import BlockingConnection, ConnectionClosed
from reprise.settings import Settings
from reprise.types import FinishReason
from support.engine_driver import greedy, load_from


def test_an_engine_started_by_hand_loads_generates_and_ends_with_its_peer(
    model_directory: Callable[[str], Path],
) -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "reprise.engine", "--fd", str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        connection: BlockingConnection[FromEngine] = BlockingConnection(ours, FromEngine)
        config = EngineConfig(model=str(model_directory("llama")), device="cpu", kv_cache_memory=1 << 20, num_threads=1)
        connection.send(Start(config, None))
        connection.send(Add(7, 0, [5, 6, 7], greedy(3, end_token_ids=())))
        messages: list[FromEngine] = []
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            messages += connection.receive(1.0)
            outputs = [o for m in messages if isinstance(m, StepOutput) for o in m.outputs]
            if outputs and outputs[-1].finish_reason is not None:
                break
        assert any(isinstance(message, Ready) for message in messages)
        assert [o.sequence_id for o in outputs] == [7, 7, 7]
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        connection.close()
        assert process.wait(10) == 0


class Slow:
    """A reservation that takes so many pieces of five milliseconds each."""

    def __init__(self, num_pieces: int) -> None:
        self.num_left = num_pieces

    @property
    def is_complete(self) -> bool:
        return self.num_left == 0

    def advance(self, seconds: float) -> None:
        time.sleep(seconds)
        self.num_left -= 1


def test_an_engine_that_takes_memory_tells_how_it_goes_and_serves_meanwhile(
    model_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "IDLE_SECONDS", 0.05)
    ours, theirs = socket.socketpair()
    reservation = Slow(10_000)
    ended: list[type[BaseException]] = []

    def run() -> None:
        core = engine_process.build_core(load_from(model_directory("llama")), None)
        try:
            engine_process._loop(core, reservation, BlockingConnection(theirs, ToEngine), [])  # type: ignore[arg-type]  # it is asked for nothing else
        except ConnectionClosed as error:
            ended.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    with ours, theirs:
        connection: BlockingConnection[FromEngine] = BlockingConnection(ours, FromEngine)
        idle = [message for _ in range(5) for message in connection.receive(10.0)]
        assert all(isinstance(message, StepOutput) and not message.outputs for message in idle)
        assert len(idle) >= 5
        connection.send(Add(7, 0, [5, 6, 7], greedy(3, end_token_ids=())))
        receive_outputs(connection, 3)
        assert not reservation.is_complete
        ours.close()
        thread.join(10)
    assert ended == [ConnectionClosed]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells it")
@pytest.mark.skipif(Path("/sys/devices/system/node/node1").exists(), reason="it takes none early here")
@pytest.mark.parametrize("reserves", [True, False])
def test_an_idle_engine_takes_the_memory_of_its_pool_where_it_is_told_to(*, reserves: bool) -> None:
    """And serves whoever comes meanwhile."""
    settings = Settings(
        model="pocket", kv_cache_memory=512 << 20, max_num_seqs=8000, max_num_batched_tokens=8000, num_threads=1
    )
    config = msgspec.structs.replace(settings.engine_config(), device="cpu")
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "reprise.engine", "--fd", str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process, ours:
        theirs.close()
        connection: BlockingConnection[FromEngine] = BlockingConnection(ours, FromEngine)
        connection.send(Start(config, None, reserves))
        messages = connection.receive(60.0)
        at_first = kilobytes(process.pid, "status", "RssAnon") * 1024
        while not any(isinstance(message, Ready) for message in messages):
            messages += connection.receive(60.0)
        ready = next(message for message in messages if isinstance(message, Ready))
        assert ready.kv_cache_memory > 500 << 20
        connection.send(Add(7, 0, [5, 6, 7], greedy(3, end_token_ids=())))
        receive_outputs(connection, 3)
        deadline = time.monotonic() + (60 if reserves else 2.5)
        while (
            kilobytes(process.pid, "status", "RssAnon") * 1024 - at_first < ready.kv_cache_memory // 2
            and time.monotonic() < deadline
        ):
            connection.receive(0.1)
        assert (kilobytes(process.pid, "status", "RssAnon") * 1024 - at_first > ready.kv_cache_memory // 2) == reserves
        ours.close()
        assert process.wait(10) == 0


ROOT = Path(__file__).resolve().parents[2]
FAULTY = """
import socket, sys
from support import faulty_engine
fault = faulty_engine.Fault(sys.argv[2], at_forward=3, seconds=60)
faulty_engine.run((fault,), socket.socket(fileno=int(sys.argv[1])), 1)
"""


@contextmanager
def faulty_engine(action: str, model: Path) -> Iterator[tuple[subprocess.Popen[bytes], BlockingConnection[FromEngine]]]:
    """An engine that works on a sequence and meets its fault in the third forward."""
    ours, theirs = socket.socketpair()
    with subprocess.Popen(
        [sys.executable, "-c", FAULTY, str(theirs.fileno()), action],
        pass_fds=[theirs.fileno()],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    ) as process:
        theirs.close()
        connection: BlockingConnection[FromEngine] = BlockingConnection(ours, FromEngine)
        config = EngineConfig(model=str(model), device="cpu", kv_cache_memory=1 << 20, num_threads=1)
        connection.send(Start(config, None))
        connection.send(Add(7, 0, [5, 6, 7], greedy(100, end_token_ids=())))
        try:
            yield process, connection
        finally:
            connection.close()
            process.kill()


def receive_outputs(connection: BlockingConnection[FromEngine], count: int) -> None:
    received = 0
    while received < count:
        received += sum(len(m.outputs) for m in connection.receive(60.0) if isinstance(m, StepOutput))


def test_heartbeats_come_in_the_middle_of_a_step_and_it_ends_with_its_peer(
    model_directory: Callable[[str], Path],
) -> None:
    with faulty_engine("sleep", model_directory("llama")) as (process, connection):
        receive_outputs(connection, 2)
        messages: list[FromEngine] = []
        deadline = time.monotonic() + 3.5
        while time.monotonic() < deadline:
            messages += connection.receive(0.1)
        assert messages == [Heartbeat()] * len(messages)
        assert len(messages) in (3, 4)
        connection.close()
        process.wait(1.0)


def test_an_error_that_nothing_can_be_done_about_ends_it_with_a_code_and_its_type(
    model_directory: Callable[[str], Path],
) -> None:
    with faulty_engine("accelerator", model_directory("llama")) as (process, connection):
        receive_outputs(connection, 2)
        with pytest.raises(ConnectionClosed):
            receive_outputs(connection, 1)
        assert process.wait(10) == EXIT_FAILED
        assert process.stderr is not None
        log = process.stderr.read().decode()
        assert "the engine failed with AcceleratorError at" in log
        assert "in happen" in log
        assert "AcceleratorError:" not in log, "its message came along, and one may quote what clients sent"
