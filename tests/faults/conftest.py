"""Fixtures: servers with faults armed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.local_server import LocalServer
from support.fault_checks import FLAGS, Watched
from support.faulty_engine import Fault
from support.faulty_server import start_faulty_server

StartFaulty = Callable[..., Watched]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder takes minutes: `make faults` runs it."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def start_faulty(wide_directory: Path, tmp_path: Path) -> Iterator[StartFaulty]:
    """A function that starts a server of the wide model with faults and further flags, and waits until it is ready."""
    servers: list[LocalServer] = []
    watched: list[Watched] = []

    def start(*faults: Fault, flags: tuple[str, ...] = ()) -> Watched:
        servers.append(start_faulty_server(faults, str(wide_directory), *FLAGS, *flags, directory=tmp_path))
        watched.append(Watched(servers[-1], asks=False))
        return watched[-1]

    yield start
    for each in watched:
        each.close()
    for server in servers:
        server.stop()


@pytest.fixture
def once(tmp_path: Path) -> Callable[..., Fault]:
    """A function that makes a fault which happens once in all the engine's lives."""
    names = iter("abcdefgh")
    return lambda action, **when: Fault(action, times=1, counter=str(tmp_path / next(names)), **when)
