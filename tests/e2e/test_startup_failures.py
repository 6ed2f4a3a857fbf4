"""What cannot be served ends soon, with its own exit code and one line that says why."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.local_server import LocalServer

HEADINGS = ("Usage:", "Try ", "reprise: 1 problem in the settings:")
Start = Callable[..., LocalServer]


def last_words(server: LocalServer, code: int) -> str:
    """The one line, error or usage, with which the server ended."""
    assert server.process.wait(60) == code, server.log
    assert "Traceback" not in server.log, server.log
    said = [line for line in server.log.splitlines() if '"level": "info"' not in line]
    causes = [line for line in said if line.strip() and not line.startswith(HEADINGS)]
    assert len(causes) == 1, server.log
    return causes[0]


def copy(model: Path, directory: Path) -> Path:
    return Path(shutil.copytree(model, directory / "model"))


def test_a_missing_directory(start_live_server: Start, tmp_path: Path) -> None:
    missing = tmp_path / "nobody" / "here" / "at-all"
    cause = last_words(start_live_server(str(missing)), 3)
    assert str(missing) in cause


def test_a_directory_without_a_model(start_live_server: Start, tmp_path: Path) -> None:
    cause = json.loads(last_words(start_live_server(str(tmp_path), "--log-format", "json"), 3))
    assert cause["level"] == "error"
    assert str(tmp_path) in cause["message"]


def test_a_draft_model_that_is_not_there(start_live_server: Start, llama_directory: Path, tmp_path: Path) -> None:
    flags = ("--num-threads", "1", "--speculate", "draft", "--draft-model", str(tmp_path / "typo"))
    cause = last_words(start_live_server(str(llama_directory), *flags), 3)
    assert f"--draft-model: There is no directory '{tmp_path / 'typo'}'" in cause


def test_a_draft_model_with_other_tokens(start_live_server: Start, llama_directory: Path) -> None:
    flags = ("--num-threads", "1", "--speculate", "draft", "--draft-model", "pocket")
    cause = last_words(start_live_server(str(llama_directory), *flags), 3)
    assert "--draft-model" in cause
    assert "pocket" in cause


def test_weights_that_are_no_numbers(start_live_server: Start, tmp_path: Path, llama_directory: Path) -> None:
    directory = copy(llama_directory, tmp_path)
    weights = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    assert name in last_words(start_live_server(str(directory), "--num-threads", "1"), 3)


def test_a_configuration_that_is_no_json(start_live_server: Start, tmp_path: Path, llama_directory: Path) -> None:
    directory = copy(llama_directory, tmp_path)
    (directory / "config.json").write_text("{")
    assert "config.json" in last_words(start_live_server(str(directory), "--num-threads", "1"), 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-model-length", "5"), ("--max-model-length", "--max-model-len")),
        (("--max-num-seqs", "many"), ("--max-num-seqs", "many")),
        (("--dtype", "float8"), ("--dtype", "float8", "bfloat16")),
        (("--config", "/nowhere/at/all.yaml"), ("/nowhere/at/all.yaml",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_unusable_settings(start_live_server: Start, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    cause = last_words(start_live_server(*arguments), 2)
    assert all(word in cause for word in words), cause


def test_unknown_settings_in_the_environment_and_in_a_file(start_live_server: Start, tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text("max_model_length: 5\n")
    assert "max_model_len" in last_words(start_live_server("--config", str(path)), 2)
    server = start_live_server(environ={"REPRISE_DTYP": "float32"})
    assert "REPRISE_DTYPE" in last_words(server, 2)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "reprise.cli", "serve", "--port", str(port)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert str(port) in ended.stderr
    assert "Traceback" not in ended.stderr
