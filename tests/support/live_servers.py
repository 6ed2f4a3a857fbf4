"""Fixtures: live servers of tiny random models, one each for the whole run.

tests/conftest.py loads this for every run, so what is heavy is imported where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.local_server import LocalServer, running_server

if TYPE_CHECKING:
    from support.live_api import LiveApi

CONTEXT = 4096
"""Tokens: long enough that a generation is still running when a test looks."""
API_KEY = "sk-canary-9f3c1e7ab2"
SERVER_FIXTURES = ("llama_server", "keyed_server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one server run in one worker, so that there is one of each."""
    for item in items:
        for name in SERVER_FIXTURES:
            if name in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(name))


def save_long_context(directory: Path, architecture: str, width: int | None = None) -> Path:
    """A tiny model with a context of CONTEXT tokens."""
    from support.servable import save_servable

    save_servable(directory, architecture, width=width)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if "max_position_embeddings" in config:
        config["max_position_embeddings"] = CONTEXT
    path.write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_long_context(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def wide_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for the kernels of real models: with 32 columns every product is summed in one order."""
    return save_long_context(tmp_path_factory.mktemp("wide"), "llama", width=320)


@pytest.fixture(scope="session")
def llama_server(llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """Serves random weights: every byte may come, and no two steps are alike. Leave it as it is."""
    flags = ("--served-model-name", "tiny", "--num-threads", "1", "--kv-cache-memory", "16MiB")
    directory = tmp_path_factory.mktemp("llama-server")
    with running_server(str(llama_directory), *flags, directory=directory) as server:
        yield server


@pytest.fixture(scope="session")
def keyed_server(llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """As `llama_server`, but it needs API_KEY and tells all that it ever logs."""
    flags = ("--served-model-name", "tiny", "--num-threads", "1", "--kv-cache-memory", "16MiB", "--log-level", "debug")
    directory = tmp_path_factory.mktemp("keyed-server")
    environ = {"REPRISE_API_KEY": API_KEY}
    with running_server(str(llama_directory), *flags, directory=directory, environ=environ) as server:
        yield server


@pytest.fixture
def api(llama_server: LocalServer) -> Iterator[LiveApi]:
    """A client of the tiny model's server."""
    from support.live_api import LiveApi

    with LiveApi(llama_server) as client:
        yield client
