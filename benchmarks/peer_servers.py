"""The servers that `benchmarks.peers` compares: how each is started at its best, and what its processes take."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import peer_builds
from benchmarks.local_server import free_port
from benchmarks.processes import kilobytes

MAX_NUM_SEQS = 64
MAX_MODEL_LEN = 1152
"""Tokens of one request at most: a prompt of 1,024 and its output."""
KV_CACHE_GIB = 4
"""More than the largest cell needs; the same for those that let one choose, so that memory compares."""
STOP_TIMEOUT = 30.0
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Command:
    """How a server is started, and what its requests need beside the fields that all share."""

    arguments: list[str]
    ready_path: str
    extra: dict[str, Any]
    model: str = "benchmark"
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Server:
    """A server in one configuration. `precision` is the weights': only equal ones are compared."""

    name: str
    precision: str
    ours: bool
    command: Callable[[Path, str, int], Command]
    """Of the peers' directory, the shape and the port. Raises NotAvailableError."""


USAGE = {"stream_options": {"include_usage": True}}


def num_cpus() -> int:
    return len(_cpus())


def _cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _reprise(*flags: str) -> Callable[[Path, str, int], Command]:
    def command(peers: Path, shape: str, port: int) -> Command:
        model = peer_builds.model_directory(peers, shape)
        arguments = [sys.executable, "-m", "reprise.cli", "serve", str(model), "--served-model-name", "benchmark"]
        arguments += ["--port", str(port), "--max-num-seqs", str(MAX_NUM_SEQS), "--max-model-len", str(MAX_MODEL_LEN)]
        arguments += ["--kv-cache-memory", f"{KV_CACHE_GIB}GiB", *flags]
        return Command(arguments, "/ready", USAGE | {"ignore_eos": True})

    return command


def _llama(precision: str, *flags: str) -> Callable[[Path, str, int], Command]:
    def command(peers: Path, shape: str, port: int) -> Command:
        server = peer_builds.llama_checkout(peers) / "build/bin/llama-server"
        model = peer_builds.gguf_file(peers, shape, precision)
        threads = str(num_cpus())
        arguments = [str(server), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
        arguments += ["-np", str(MAX_NUM_SEQS), "-t", threads, "-tb", threads, "--cont-batching", "-fa", "on"]
        # Finished prompts are not copied out of their slots; what a slot holds is still reused.
        arguments += ["--cache-ram", "0", "--no-ui", "--offline", *flags]
        # The others take the largest logit; without this, llama.cpp would first sort out 40.
        return Command(arguments, "/health", USAGE | {"ignore_eos": True, "samplers": ["top_k"], "top_k": 1})

    return command


def _vllm(peers: Path, shape: str, port: int) -> Command:
    python = peer_builds.vllm_python(peers)
    model = peer_builds.model_directory(peers, shape)
    arguments = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    arguments += ["--served-model-name", "benchmark", "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)]
    arguments += ["--enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log"]
    environ = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, _cpus())),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CACHE_ROOT": str(peers / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(map(str, peer_builds.preloaded_by_vllm(peers))),
    }
    return Command(arguments, "/health", USAGE | {"ignore_eos": True}, environ=environ)


def _transformers(peers: Path, shape: str, port: int) -> Command:
    model = str(peer_builds.model_directory(peers, shape))
    program = Path(sys.executable).with_name("transformers")
    if not program.exists():
        raise peer_builds.NotAvailableError(f"there is no {program}")
    arguments = [str(program), "serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    arguments += ["--dtype", "bfloat16", "--continuous-batching", "--log-level", "error"]
    # Without sizes it takes nearly all of the machine's memory for its cache.
    arguments += ["--cb-block-size", "32", "--cb-num-blocks", "512", "--cb-max-batch-tokens", "2048"]
    # It has no ignore_eos: an end that is no token is never met.
    settings = json.dumps({"eos_token_id": -1, "do_sample": False})
    return Command(arguments, "/health", {"generation_config": settings}, model=model)


# A slot each: 64 streams of their own. Unified: one pool for all, as small as what is asked of it.
SLOTS = ("-c", str(MAX_NUM_SEQS * MAX_MODEL_LEN))
UNIFIED = ("--kv-unified", "-c", str(MAX_NUM_SEQS * 256))

SERVERS = {
    server.name: server
    for server in (
        Server("reprise", "bf16", ours=True, command=_reprise()),
        Server("reprise-nondeterministic", "bf16", ours=True, command=_reprise("--no-deterministic")),
        Server("llama.cpp", "bf16", ours=False, command=_llama("bf16", *SLOTS)),
        Server("llama.cpp-unified", "bf16", ours=False, command=_llama("bf16", *UNIFIED)),
        Server("vllm", "bf16", ours=False, command=_vllm),
        Server("transformers", "bf16", ours=False, command=_transformers),
        Server("reprise-int8", "int8", ours=True, command=_reprise("--quantize", "int8")),
        Server("llama.cpp-q8_0", "int8", ours=False, command=_llama("q8_0", *SLOTS)),
        Server("reprise-int4", "int4", ours=True, command=_reprise("--quantize", "int4")),
        Server("llama.cpp-q4_0", "int4", ours=False, command=_llama("q4_0", *SLOTS)),
    )
}
DEFAULT_SERVERS = ("reprise", "reprise-nondeterministic", "llama.cpp", "vllm", "transformers")


@dataclass
class Running:
    """A started server. Times are seconds on the clock of `time.perf_counter`."""

    process: subprocess.Popen[bytes]
    command: Command
    base_url: str
    log: Path
    started: float
    peaks: dict[int, int] = field(default_factory=dict)
    """The largest resident size that each process had, in bytes, as last seen."""
    largest_share: int = 0
    """The largest proportional size seen, of all processes together: shared pages count once."""

    def wait_until_ready(self, timeout: float) -> float:
        """Seconds from the start. Raises NotAvailableError with the end of its log."""
        while not _answers(self.base_url + self.command.ready_path):
            if self.process.poll() is not None:
                raise peer_builds.NotAvailableError(f"ended with {self.process.returncode}: {self.log_end()}")
            if time.perf_counter() - self.started > timeout:
                raise peer_builds.NotAvailableError(f"not ready after {timeout:g} s: {self.log_end()}")
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - self.started

    def note_memory(self) -> None:
        """Look at the processes' memory; between measurements, since the kernel walks their pages."""
        share = 0
        for pid in _tree(self.process.pid):
            self.peaks[pid] = max(self.peaks.get(pid, 0), kilobytes(pid, "status", "VmHWM") * 1024)
            share += kilobytes(pid, "smaps_rollup", "Pss") * 1024
        self.largest_share = max(self.largest_share, share)

    def log_end(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-1500:]

    def stop(self) -> None:
        """Ask the server to end, and kill what is left of it and of its descendants after a while."""
        before = {pid: _start_time(pid) for pid in _tree(self.process.pid)}
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        deadline = time.perf_counter() + STOP_TIMEOUT
        while time.perf_counter() < deadline and (self.process.poll() is None or _tree(self.process.pid)):
            time.sleep(POLL_SECONDS)
        before |= {pid: _start_time(pid) for pid in _tree(self.process.pid)}
        for pid in (pid for pid, start in before.items() if start is not None and _start_time(pid) == start):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(server: Server, *, peers: Path, shape: str) -> Iterator[Running]:
    """Start a server; it and all that it started have ended at the end. Raises NotAvailableError."""
    port = free_port()
    command = server.command(peers, shape, port)
    (peers / "logs").mkdir(parents=True, exist_ok=True)
    log = peers / "logs" / f"{server.name}-{shape}.log"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("REPRISE_", "VLLM_"))}
    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command.arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=inherited | quiet | command.environ,
            start_new_session=True,
        )
    server_process = Running(process, command, f"http://127.0.0.1:{port}", log, started)
    try:
        yield server_process
    finally:
        server_process.stop()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 # our own address
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _tree(root: int) -> list[int]:
    """Living processes of the session that `root` leads, and descendants that left it; Linux only, else nothing."""
    parents: dict[int, int] = {}
    members: set[int] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        state, parent, session = fields[0], int(fields[1]), int(fields[3])
        if state != "Z":
            parents[int(stat.parent.name)] = parent
            if session == root:
                members.add(int(stat.parent.name))
    while more := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= more
    return sorted(members)


def _start_time(pid: int) -> str | None:
    """What tells a process from a later one with the same id; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return None
