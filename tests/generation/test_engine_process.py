"""One life of an engine process: how it ends is known, and it does end."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from reprise.generation import fork_server
from reprise.generation.engine_process import EngineEntry, EngineProcess
from reprise.ipc.messages import FromEngine, LoadFailed
from support import engine_lives
from support.engine_processes import process_state
from support.fork_servers import fork_server_pid, kill_fork_server, stop_fork_server

pytestmark = pytest.mark.anyio


async def start(entry: EngineEntry) -> EngineProcess:
    return await EngineProcess.start(entry, 60.0)


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
    ("exit_code", "how"),
    [(0, "with exit code 0"), (7, "with exit code 7"), (-signal.SIGABRT, "by SIGABRT"), (-40, "by signal 40")],
)
async def test_it_tells_how_it_ended(exit_code: int, how: str) -> None:
    process = await start(partial(engine_lives.send_and_end, exit_code))
    assert await process.read() == [LoadFailed("1"), LoadFailed("2")]
    assert await process.read() == []
    assert await process.end() == how
    assert not process.was_killed


async def read_all(process: EngineProcess) -> list[FromEngine]:
    found: list[FromEngine] = []
    while messages := await process.read():
        found += messages
    return found


EVENT_LOOPS = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": on}) for on in (False, True)])


@EVENT_LOOPS
async def test_its_last_words_are_heard_though_it_did_not_read_what_it_was_told() -> None:
    """Its end of the channel is reset then, maybe before what it had said is read here."""
    process = await start(engine_lives.end_with_a_message_unread)
    process.send(LoadFailed("not read"))
    for _ in range(1000):
        if process_state(process.pid) in {"", "Z"}:
            break
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert await read_all(process) == [LoadFailed("1"), LoadFailed("2")]
    assert await process.end() == "with exit code 0"


@EVENT_LOOPS
async def test_its_last_words_are_heard_though_it_is_told_something_after_its_end() -> None:
    process = await start(partial(engine_lives.send_and_end, 0))
    while process_state(process.pid) not in {"", "Z"}:
        time.sleep(0.01)  # noqa: ASYNC251 # nothing is to be read meanwhile
    for _ in range(3):
        process.send(LoadFailed("nobody hears it"))
        await asyncio.sleep(0)
    assert await read_all(process) == [LoadFailed("1"), LoadFailed("2")]
    assert await process.end() == "with exit code 0"


async def test_a_kill_from_elsewhere_is_told_from_its_own() -> None:
    process = await start(engine_lives.wait)
    os.kill(process.pid, signal.SIGKILL)
    assert await process.read() == []
    assert await process.end() == "by SIGKILL"
    assert process.was_killed
    process = await start(engine_lives.wait)
    assert await process.end() == "by SIGKILL"
    assert not process.was_killed
    process.send(LoadFailed("nobody hears it"))


async def test_one_that_is_stopped_is_woken_to_tell_where_it_stands_and_killed() -> None:
    process = await start(engine_lives.wait)
    os.kill(process.pid, signal.SIGSTOP)
    await process.kill_hung()
    assert await process.read() == []
    assert await process.end() in {"by SIGKILL", "by SIGUSR1"}
    assert not process.was_killed


@pytest.mark.usefixtures("handles")
async def test_one_that_hangs_is_killed_though_its_fork_server_is_gone() -> None:
    process = await start(engine_lives.wait)
    kill_fork_server()
    os.kill(process.pid, signal.SIGSTOP)
    await process.kill_hung()
    assert await asyncio.wait_for(process.read(), 10) == []
    assert await process.end() == "unseen by its fork server"
    assert process_state(process.pid) in {"", "Z"}
    assert not process.was_killed


@pytest.mark.usefixtures("handles")
async def test_the_end_is_one_though_the_fork_server_is_gone() -> None:
    process = await start(engine_lives.wait)
    kill_fork_server()
    assert await process.end() == "unseen by its fork server"
    assert process_state(process.pid) in {"", "Z"}
    assert not process.was_killed


async def test_a_death_that_nobody_saw_may_have_been_a_kill_from_elsewhere() -> None:
    process = await start(engine_lives.wait)
    kill_fork_server()
    os.kill(process.pid, signal.SIGTERM)
    assert await process.read() == []
    assert await process.end() == "unseen by its fork server"
    assert process.was_killed


async def test_a_start_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    mark = tmp_path / "ended"
    starting = asyncio.create_task(start(partial(engine_lives.mark_the_end, str(mark))))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    for _ in range(1000):
        if mark.exists():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the process does not see that nobody wants it")


async def test_a_fork_server_that_gives_no_process_is_replaced() -> None:
    await (await start(engine_lives.wait)).end()
    stopped = stop_fork_server()
    with pytest.raises(TimeoutError, match=r"no process in 0\.5 seconds"):
        await EngineProcess.start(engine_lives.wait, 0.5)
    await asyncio.sleep(0.2)
    gc.collect()  # no future is left with an exception that nobody asked for
    assert process_state(stopped) == ""
    process = await start(engine_lives.wait)
    assert fork_server_pid() not in {None, stopped}
    assert await process.end() == "by SIGKILL"


async def test_a_fork_server_that_does_not_tell_of_an_end_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "REPORT_SECONDS", 0.5)
    process = await start(engine_lives.wait)
    stopped = stop_fork_server()
    assert await process.end() == "unseen by its fork server"
    assert process_state(process.pid) in {"", "Z"}
    assert process_state(stopped) == ""
    assert multiprocessing.active_children() == []
    assert await (await start(engine_lives.wait)).end() == "by SIGKILL"


HANGING_START = """
import asyncio, os, signal
from reprise.generation import engine_process, fork_server
from support import engine_lives
from support.fork_servers import fork_server_pid

async def main():
    fork_server.start_fork_server()
    os.kill(fork_server_pid(), signal.SIGSTOP)
    starting = asyncio.create_task(engine_process.EngineProcess.start(engine_lives.wait, 600))
    await asyncio.sleep(1)
    print(fork_server_pid(), starting.done())

asyncio.run(main())
"""


def test_a_start_that_hangs_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    """The interpreter waits for the threads of `asyncio.to_thread`, for ever."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = tmp_path / "output"
    with output.open("wb") as file:
        # Not a pipe: the fork server, which stays behind, would hold it open.
        subprocess.run([sys.executable, "-c", HANGING_START], env=variables, stdout=file, timeout=30, check=True)
    stopped, done = output.read_text().split()
    os.kill(int(stopped), signal.SIGKILL)
    assert done == "False"
