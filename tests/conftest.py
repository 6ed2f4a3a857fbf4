"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.local_server import LocalServer, running_server, start_server
from reprise.engine.math_libraries import ask_for_one_order_here

pytest_plugins = ["support.live_servers"]

# As an engine does when it loads: here models compute before the first one is loaded.
ask_for_one_order_here(os.environ)

LIVE_SERVER_FIXTURES = {"live_server", "live_base_url"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the shared server run in one worker, so that there is one server."""
    for item in items:
        if LIVE_SERVER_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("live_server"))


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A real `reprise serve` of the bundled model, one for the whole run. Leave it as it is."""
    directory = tmp_path_factory.mktemp("live-server")
    with running_server("pocket", "--num-threads", "1", directory=directory) as server:
        yield server


@pytest.fixture(scope="session")
def live_base_url(live_server: LocalServer) -> str:
    return live_server.base_url


@pytest.fixture
def start_live_server(tmp_path: Path) -> Iterator[Callable[..., LocalServer]]:
    """A function that starts a server of the test's own: the arguments of `reprise serve`, and `environ`.

    It returns while the server loads: call `wait_until_ready`. Servers are stopped after the test.
    """
    servers: list[LocalServer] = []

    def start(*arguments: str, **options: dict[str, str]) -> LocalServer:
        servers.append(start_server(*arguments, environ=options.get("environ"), directory=tmp_path))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
