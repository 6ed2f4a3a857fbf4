"""The engine's entry point for a debugger: `python -m reprise.engine` on an inherited socket."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from reprise.ipc.messages import Add, EngineConfig, FromEngine, Ready, Start, StepOutput
from reprise.ipc.transport import BlockingConnection
from reprise.types import FinishReason
from support.engine_driver import greedy


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
