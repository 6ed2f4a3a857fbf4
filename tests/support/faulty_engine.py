"""An engine process with faults armed: the real one, whose forward or load misbehaves when a test says so.

    AsyncEngine(config, tokenizer, entry=partial(faulty_engine.run, (Fault("abort", token_id=7),)))

`support.faulty_server` is the same for a whole server.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from torch import Tensor

    from reprise.engine.loader import LoadedModel
    from reprise.engine.model_runner import ModelRunner
    from reprise.engine.scheduler import Batch
    from reprise.engine.sequence import Sequence

Action = Literal[
    "raise", "memory", "oom", "allocator", "accelerator", "nan", "abort", "segfault", "exit", "kill", "stop", "sleep"
]


class Fault(msgspec.Struct, frozen=True):
    """What happens in a forward pass, and when: in every one that meets all conditions."""

    action: Action
    token_id: int | None = None
    """Only where a sequence of the batch has this id in its prompt."""
    at_forward: int | None = None
    """Only in the n-th forward of a life, from 1; what the check at load computes does not count."""
    from_forward: int = 1
    """Only in the n-th forward of a life and later ones."""
    min_sequences: int = 1
    min_tokens: int = 1
    """Only where the batch computes at least so many: as memory would run out."""
    times: int | None = None
    """At most so often, over all lives of the engine; needs `counter`."""
    counter: str = ""
    """A file that gets a byte each time."""
    armed_by: str = ""
    """A file without which nothing happens."""
    seconds: float = 0.0
    """For `sleep`, which comes before the forward; heartbeats go on meanwhile."""
    in_load: bool = False
    """Before loading instead of in a forward; the conditions on batches do not count."""

    def hits(self, batch: Batch) -> list[bool]:
        """For each entry whether it has the token; all where no token is asked for."""
        return [
            self.token_id is None or self.token_id in s.sequence.token_ids[: s.sequence.num_prompt_tokens]
            for s in batch
        ]

    def is_due(self, batch: Batch, num_forwards: int) -> bool:
        return (
            not self.in_load
            and any(self.hits(batch))
            and self.at_forward in (None, num_forwards)
            and num_forwards >= self.from_forward
            and len(batch) >= self.min_sequences
            and sum(s.num_tokens for s in batch) >= self.min_tokens
            and self.may_happen()
        )

    def may_happen(self) -> bool:
        """Whether it has not happened `times` yet; counts it."""
        if self.armed_by and not Path(self.armed_by).exists():
            return False
        if self.times is None and not self.counter:
            return True
        path = Path(self.counter)
        if self.times is not None and path.exists() and path.stat().st_size >= self.times:
            return False
        with path.open("ab") as file:
            file.write(b".")
        return True


class FaultyRunner:
    """The real runner, with faults."""

    def __init__(self, runner: ModelRunner, faults: tuple[Fault, ...]) -> None:
        self._runner = runner
        self._faults = faults
        self._num_forwards = 0

    def run(self, batch: Batch) -> Tensor:
        self._num_forwards += 1
        due = [fault for fault in self._faults if fault.is_due(batch, self._num_forwards)]
        for fault in due:
            happen(fault)
        logits = self._runner.run(batch).clone()
        for fault in due:
            if fault.action == "nan":
                rows = [hit for hit, s in zip(fault.hits(batch), batch, strict=True) for _ in range(s.num_logit_rows)]
                for row, hit in enumerate(rows):
                    if hit:
                        logits[row] = float("nan")
        return logits

    def forget(self, sequence: Sequence) -> None:
        self._runner.forget(sequence)


def happen(fault: Fault) -> None:
    """Do what the fault's name says."""
    import torch

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    match fault.action:
        case "raise":
            raise ValueError("a bug in a model's code")
        case "memory":
            raise MemoryError
        case "oom":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        case "allocator":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes")
        case "accelerator":
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        case "abort":
            os.abort()
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(fault.seconds)


def run(faults: tuple[Fault, ...], sock: socket.socket, parent: int) -> None:
    """The entry point of an engine process, as `generation.engine_entry.run`, with faults armed."""
    from reprise.engine import loader, process

    build_core, load = process.build_core, loader.load

    def build_faulty_core(loaded: LoadedModel, *arguments: Any) -> Any:
        loaded.runner = FaultyRunner(loaded.runner, faults)
        return build_core(loaded, *arguments)

    def load_with_faults(*arguments: Any) -> LoadedModel:
        for fault in faults:
            if fault.in_load and fault.may_happen():
                happen(fault)
        return load(*arguments)

    setattr(process, "build_core", build_faulty_core)  # noqa: B010 # mypy lets no function be replaced
    setattr(process, "load", load_with_faults)  # noqa: B010 # as above
    process.run_forked(sock, parent)


def run_garbled(frames: tuple[bytes, ...], counter: str, sock: socket.socket, parent: int) -> None:
    """An engine that, once in all of its lives, sends these bytes before the third output of a step."""
    from reprise.engine import process
    from reprise.ipc.messages import StepOutput
    from reprise.ipc.transport import BlockingConnection

    once = Fault("raise", times=1, counter=counter)
    send = BlockingConnection.send
    num_outputs = 0

    def send_garbled(connection: BlockingConnection[Any], message: msgspec.Struct) -> None:
        nonlocal num_outputs
        if isinstance(message, StepOutput) and message.outputs:
            num_outputs += 1
            if num_outputs == 3 and once.may_happen():
                for frame in frames:
                    sock.sendall(frame)
        send(connection, message)

    setattr(BlockingConnection, "send", send_garbled)  # noqa: B010 # mypy lets no method be replaced
    process.run_forked(sock, parent)
