"""One life of an engine process: how it ends is known, and it does end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from reprise.generation import fork_server
from reprise.generation.engine_process import EngineProcess
from reprise.ipc.messages import LoadFailed
from support import engine_lives
from support.engine_processes import process_state
from support.fork_servers import kill_fork_server

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module", autouse=True)
def light_fork_server() -> Iterator[None]:
    """One that starts at once: it imports nothing."""
    kill_fork_server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fork_server, "PRELOAD", ())
        yield
    kill_fork_server()


@pytest.fixture(params=[True, False], ids=["handle", "number"])
def handles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is, once as where the kernel knows processes by their numbers only."""
    if not request.param:
        monkeypatch.delattr(os, "pidfd_open")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize(
    ("exit_code", "how"), [(0, "with exit code 0"), (7, "with exit code 7"), (-signal.SIGABRT, "by SIGABRT")]
)
async def test_it_tells_how_it_ended(exit_code: int, how: str) -> None:
    process = await EngineProcess.start(partial(engine_lives.send_and_end, exit_code))
    assert await process.read() == [LoadFailed("1"), LoadFailed("2")]
    assert await process.read() == []
    assert await process.end() == how
    assert not process.was_killed


async def test_a_kill_from_elsewhere_is_told_from_its_own() -> None:
    process = await EngineProcess.start(engine_lives.wait)
    os.kill(process.pid, signal.SIGKILL)
    assert await process.read() == []
    assert await process.end() == "by SIGKILL"
    assert process.was_killed
    process = await EngineProcess.start(engine_lives.wait)
    assert await process.end() == "by SIGKILL"
    assert not process.was_killed
    process.send(LoadFailed("nobody hears it"))


async def test_one_that_is_stopped_is_woken_to_tell_where_it_stands_and_killed() -> None:
    process = await EngineProcess.start(engine_lives.wait)
    os.kill(process.pid, signal.SIGSTOP)
    await process.kill_hung()
    assert await process.read() == []
    assert await process.end() in {"by SIGKILL", "by SIGUSR1"}
    assert not process.was_killed


@pytest.mark.usefixtures("handles")
async def test_one_that_hangs_is_killed_though_its_fork_server_is_gone() -> None:
    process = await EngineProcess.start(engine_lives.wait)
    kill_fork_server()
    os.kill(process.pid, signal.SIGSTOP)
    await process.kill_hung()
    assert await asyncio.wait_for(process.read(), 10) == []
    assert await process.end() == "unseen by its fork server"
    assert process_state(process.pid) in {"", "Z"}
    assert not process.was_killed


@pytest.mark.usefixtures("handles")
async def test_the_end_is_one_though_the_fork_server_is_gone() -> None:
    process = await EngineProcess.start(engine_lives.wait)
    kill_fork_server()
    assert await process.end() == "unseen by its fork server"
    assert process_state(process.pid) in {"", "Z"}
    assert not process.was_killed


async def test_a_death_that_nobody_saw_may_have_been_a_kill_from_elsewhere() -> None:
    process = await EngineProcess.start(engine_lives.wait)
    kill_fork_server()
    os.kill(process.pid, signal.SIGTERM)
    assert await process.read() == []
    assert await process.end() == "unseen by its fork server"
    assert process.was_killed


async def test_a_start_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    mark = tmp_path / "ended"
    starting = asyncio.create_task(EngineProcess.start(partial(engine_lives.mark_the_end, str(mark))))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    for _ in range(1000):
        if mark.exists():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the process does not see that nobody wants it")
