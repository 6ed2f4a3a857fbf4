"""What becomes of a model that is no directory, with a hub that a test runs, or with none."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.local_server import LocalServer
from reprise import hub
from reprise.errors import ModelLoadError
from reprise.exit_code import ExitCode
from reprise.hub import comes_from_hub, go_offline_if_unreachable

Start = Callable[..., LocalServer]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class EmptyHub(BaseHTTPRequestHandler):
    """Has no model at all."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 # the standard library's name

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def empty_hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def closed_endpoint() -> Iterator[str]:
    """An address that nobody listens on, as long as the test lasts."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def cache(home: Path, model: str, directory: Path) -> None:
    """Lay a model into a hub cache, as a download would."""
    place = home / "hub" / f"models--{model.replace('/', '--')}"
    (place / "snapshots" / COMMIT).mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(COMMIT)
    for file in directory.iterdir():
        (place / "snapshots" / COMMIT / file.name).symlink_to(file)


def environment(home: Path, endpoint: str) -> dict[str, str]:
    return {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""}


def ended(server: LocalServer) -> tuple[list[str], str]:
    """What a server that could not be started said, in records: messages of level info, and the one error."""
    assert server.process.wait(60) == ExitCode.MODEL, server.log
    records = [json.loads(line) for line in server.log.splitlines()]  # each line is a record of ours
    (error,) = [record["message"] for record in records if record["level"] != "info"]
    return [record["message"] for record in records if record["level"] == "info"], error


def test_a_hub_that_cannot_be_reached_is_given_up_at_once_and_told_of(
    start_live_server: Start, tmp_path: Path, closed_endpoint: str
) -> None:
    start = time.monotonic()
    server = start_live_server("no/such-model-xyz", environ=environment(tmp_path, closed_endpoint))
    said, error = ended(server)
    assert time.monotonic() - start < 30  # huggingface_hub's own attempts take 49 s
    assert f"there is no directory 'no/such-model-xyz' here: asking the hub, {closed_endpoint}" in said
    assert error == (
        "cannot serve no/such-model-xyz: There is no directory 'no/such-model-xyz', and the hub cannot be reached"
        " (127.0.0.1: Connection refused; HF_HUB_OFFLINE=0 has it asked all the same), and its cache on this machine"
        " has no such model."
    )


def test_a_draft_model_of_a_hub_that_cannot_be_reached_is_given_up_at_once(
    start_live_server: Start, tmp_path: Path, closed_endpoint: str, llama_directory: Path
) -> None:
    start = time.monotonic()
    flags = ("--speculate", "draft", "--draft-model", "no/such-draft")
    server = start_live_server(str(llama_directory), *flags, environ=environment(tmp_path, closed_endpoint))
    _, error = ended(server)
    assert time.monotonic() - start < 30
    assert "--draft-model: There is no directory 'no/such-draft', and the hub cannot be reached" in error


def test_a_name_that_the_hub_does_not_have_may_be_a_mistyped_directory(
    start_live_server: Start, tmp_path: Path, empty_hub: str
) -> None:
    _, error = ended(start_live_server("models/lama", environ=environment(tmp_path, empty_hub)))
    assert error.startswith("cannot serve models/lama: There is no directory 'models/lama', and the hub has no such")


def test_a_model_in_the_cache_is_served_without_the_hub(
    start_live_server: Start, tmp_path: Path, closed_endpoint: str, llama_directory: Path
) -> None:
    cache(tmp_path, "some/model", llama_directory)
    flags = ("--num-threads", "1", "--kv-cache-memory", "16MiB")
    server = start_live_server("some/model", *flags, environ=environment(tmp_path, closed_endpoint))
    server.wait_until_ready(120)
    records = [json.loads(line) for line in server.log.splitlines()]
    (warning,) = [record["message"] for record in records if record["level"] == "warning"]
    assert warning.startswith("the hub cannot be reached (127.0.0.1: Connection refused)")
    assert server.stop() == ExitCode.OK


def test_a_hub_that_answers_is_asked(empty_hub: str) -> None:
    environ = {"HF_ENDPOINT": empty_hub}
    assert go_offline_if_unreachable(environ) is None
    assert environ == {"HF_ENDPOINT": empty_hub}


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("value", ["0", "1"])
def test_who_has_decided_whether_to_be_offline_is_not_overruled(
    closed_endpoint: str, variable: str, value: str
) -> None:
    environ = {"HF_ENDPOINT": closed_endpoint, variable: value}
    assert go_offline_if_unreachable(environ) is None
    assert environ[variable] == value


def test_an_address_that_refuses_sets_offline(closed_endpoint: str) -> None:
    environ = {"HF_ENDPOINT": closed_endpoint}
    assert go_offline_if_unreachable(environ) == "127.0.0.1: Connection refused"
    assert environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_a_proxy_is_left_to_look_up_the_name(
    closed_endpoint: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://proxy.invalid:3128")
    assert go_offline_if_unreachable({"HF_ENDPOINT": closed_endpoint}) is None
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert go_offline_if_unreachable({"HF_ENDPOINT": closed_endpoint}) is not None


def test_one_address_that_answers_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where IPv6 leads nowhere: its address comes first, and what is sent there is lost."""
    release = threading.Event()

    def of_one(address: tuple[str, int], **_: Any) -> socket.socket:
        if address[0] == "2001:db8::1":
            release.wait(30)
            raise OSError("released")
        return socket.socket()

    found = [(socket.AF_INET6, 1, 6, "", ("2001:db8::1", 80, 0, 0)), (socket.AF_INET, 1, 6, "", ("192.0.2.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "create_connection", of_one)
    try:
        assert go_offline_if_unreachable({}) is None
    finally:
        release.set()


def test_a_name_whose_look_up_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def hang(*_: object, **__: object) -> None:
        release.wait(10)
        raise OSError("released")

    monkeypatch.setattr(hub, "REACH_SECONDS", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        assert go_offline_if_unreachable({}) == "huggingface.co did not answer within 0.05 s"
    finally:
        release.set()


def test_a_directory_and_a_path_are_no_business_of_the_hub(tmp_path: Path, llama_directory: Path) -> None:
    assert comes_from_hub("some/model")
    assert not comes_from_hub(str(llama_directory))
    with pytest.raises(ModelLoadError, match="There is no directory"):
        comes_from_hub(str(tmp_path / "nowhere"))
