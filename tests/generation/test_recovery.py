"""What becomes of requests when the engine process dies, hangs, talks nonsense or cannot be loaded again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reprise.errors import GenerationError, ModelLoadError, UnavailableError
from reprise.generation.async_engine import AsyncEngine
from reprise.generation.engine_process import EngineEntry
from reprise.generation.fork_server import start_fork_server
from reprise.generation.interface import EngineState
from reprise.generation.request_stream import RequestStream, merge
from reprise.generation.supervision import HangLimits
from reprise.ipc.messages import EngineConfig, EngineStats, FromEngine, LoadProgress, SequenceOutput, StepOutput
from reprise.ipc.transport import MessageCodec
from reprise.text.tokenizer import Tokenizer
from reprise.types import ChoiceDelta, GenerationRequest, SamplingParams
from support import faulty_engine
from support.faulty_engine import Action, Fault
from support.fork_servers import kill_fork_server, stop_fork_server
from support.servable import save_servable

pytestmark = pytest.mark.anyio

NUM_TOKENS = 60


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_servable(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(str(directory))


@pytest.fixture(scope="module")
def poison(tokenizer: Tokenizer) -> int:
    """A token that no other prompt has."""
    return tokenizer.encode("~", add_special_tokens=False)[0]


@pytest.fixture
def counter(tmp_path: Path) -> str:
    return str(tmp_path / "counter")


def config(directory: Path) -> EngineConfig:
    return EngineConfig(model=str(directory), device="cpu", kv_cache_memory=1 << 20, num_threads=1)


@asynccontextmanager
async def started(
    directory: Path,
    tokenizer: Tokenizer,
    entry: EngineEntry | None = None,
    limits: HangLimits | None = None,
    on_progress: Callable[[LoadProgress], None] | None = None,
) -> AsyncIterator[AsyncEngine]:
    entry = entry or partial(faulty_engine.run, ())
    engine = AsyncEngine(config(directory), tokenizer, limits=limits, entry=entry, on_progress=on_progress)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def armed(*faults: Fault) -> EngineEntry:
    return partial(faulty_engine.run, faults)


def requests(tokenizer: Tokenizer, count: int = 3) -> list[GenerationRequest]:
    """Greedy and sampled ones; the last has two choices."""
    return [
        GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=tokenizer.encode("The quick brown fox " * (1 + index), add_special_tokens=True),
            sampling=SamplingParams(
                seed=index, temperature=float(index % 2), max_tokens=NUM_TOKENS, end_token_ids=(), num_logprobs=1
            ),
            num_choices=2 if index == count - 1 else 1,
        )
        for index in range(count)
    ]


def poisonous(tokenizer: Tokenizer, poison: int, **changes: Any) -> GenerationRequest:
    request = requests(tokenizer, 1)[0]
    return msgspec.structs.replace(
        request, request_id="bad", prompt_token_ids=[*request.prompt_token_ids, poison], **changes
    )


async def collect(stream: RequestStream) -> dict[int, ChoiceDelta]:
    folded: dict[int, ChoiceDelta] = {}
    async for delta in stream:
        previous = folded.get(delta.index)
        folded[delta.index] = delta if previous is None else merge(previous, delta)
    return folded


async def answers(engine: AsyncEngine, wanted: list[GenerationRequest]) -> list[list[tuple[Any, ...]]]:
    """What each request's choices say, all at once."""
    folded = await asyncio.gather(*(collect(engine.submit(request)) for request in wanted))
    return [[told(delta) for _, delta in sorted(choices.items())] for choices in folded]


def told(delta: ChoiceDelta) -> tuple[Any, ...]:
    return delta.text, delta.token_ids, delta.finish_reason, delta.logprobs


@pytest.fixture(scope="module")
async def undisturbed(directory: Path, tokenizer: Tokenizer) -> list[list[tuple[Any, ...]]]:
    async with started(directory, tokenizer) as engine:
        return await answers(engine, requests(tokenizer))


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("action", ["abort", "segfault", "exit", "kill", "accelerator"])
async def test_whatever_it_dies_of_is_a_pause(
    action: Action, directory: Path, tokenizer: Tokenizer, counter: str, undisturbed: list[list[tuple[Any, ...]]]
) -> None:
    entry = armed(Fault(action, at_forward=20, times=1, counter=counter))
    async with started(directory, tokenizer, entry) as engine:
        assert await answers(engine, requests(tokenizer)) == undisturbed
        assert (engine.num_restarts, engine.num_recovered, engine.num_lost, engine.num_hung) == (1, 4, 0, 0)
        assert 0 < engine.last_recovery_seconds < 20
        assert engine.num_dropped == 0


async def test_a_dead_engine_runs_nothing_and_holds_nothing_and_what_it_counted_stays(
    directory: Path, tokenizer: Tokenizer
) -> None:
    async with started(directory, tokenizer) as engine:
        answering = asyncio.create_task(answers(engine, requests(tokenizer)))
        await until(lambda: engine.stats.num_generated_tokens > 40)
        before = engine.stats
        assert (before.num_running, before.num_waiting) == (4, 0)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: engine.state is EngineState.RECOVERING)
        dead = engine.stats
        assert (dead.num_running, dead.num_kv_tokens_used, dead.num_kv_tokens_cached) == (0, 0, 0)
        assert dead.num_waiting == 4
        waiting = engine.submit(requests(tokenizer)[0])
        assert engine.stats.num_waiting == 5
        waiting.close()
        assert engine.stats.num_waiting == 4
        previous = before
        while not answering.done():
            assert engine.stats.num_running + engine.stats.num_waiting >= len(engine._choices)
            for name in ("num_steps", "num_generated_tokens", "num_prompt_tokens", "step_seconds"):
                assert getattr(engine.stats, name) >= getattr(previous, name)
            previous = engine.stats
            await asyncio.sleep(0.005)
        await answering
        assert engine.stats.num_generated_tokens >= 4 * NUM_TOKENS
        assert engine.stats.num_prompt_tokens > before.num_prompt_tokens
        assert engine.stats.num_waiting == 0


async def test_who_is_held_back_during_a_trial_waits(directory: Path, tokenizer: Tokenizer, poison: int) -> None:
    slowly = Fault("sleep", seconds=0.5, token_id=poison)
    async with started(directory, tokenizer, armed(slowly, Fault("abort", token_id=poison))) as engine:
        bad = engine.submit(poisonous(tokenizer, poison))
        answering = asyncio.create_task(answers(engine, requests(tokenizer)))
        await until(lambda: engine._suspects.on_trial and engine.state is EngineState.READY)
        assert engine.stats.num_waiting == 6 - engine.stats.num_running
        assert engine.stats.num_waiting >= 4
        with pytest.raises(GenerationError):
            await collect(bad)
        await answering


async def test_one_that_shows_no_life_is_killed_and_replaced(
    directory: Path, tokenizer: Tokenizer, counter: str, undisturbed: list[list[tuple[Any, ...]]]
) -> None:
    stop = Fault("stop", at_forward=20, times=1, counter=counter)
    # The supervisor wakes it, to hear where it stands: without this it would finish what it had begun.
    sleep = Fault("sleep", seconds=600, at_forward=20, times=1, counter=counter + "2")
    async with started(directory, tokenizer, armed(stop, sleep), HangLimits(heartbeat_timeout=2.0)) as engine:
        assert await answers(engine, requests(tokenizer)) == undisturbed
        assert (engine.num_restarts, engine.num_hung, engine.num_recovered) == (1, 1, 4)


async def test_one_that_hangs_is_killed_and_replaced_though_its_fork_server_is_gone(
    directory: Path, tokenizer: Tokenizer, counter: str, undisturbed: list[list[tuple[Any, ...]]]
) -> None:
    entry = armed(Fault("sleep", seconds=600, at_forward=20, times=1, counter=counter))
    async with started(directory, tokenizer, entry, HangLimits(step_timeout=1.5)) as engine:
        kill_fork_server()
        assert await answers(engine, requests(tokenizer)) == undisturbed
        assert (engine.num_restarts, engine.num_hung, engine.num_recovered) == (1, 1, 4)


async def test_a_death_beside_a_fork_server_that_hangs_is_a_pause(
    directory: Path,
    tokenizer: Tokenizer,
    undisturbed: list[list[tuple[Any, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reprise.generation.fork_server.REPORT_SECONDS", 0.5)
    async with started(directory, tokenizer) as engine:
        answering = asyncio.create_task(answers(engine, requests(tokenizer)))
        await until(lambda: engine.stats.num_generated_tokens > 8)
        stop_fork_server()
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        assert await answering == undisturbed
        assert (engine.num_restarts, engine.num_recovered, engine.num_lost) == (1, 4, 0)


async def test_a_start_that_hangs_is_a_death(
    directory: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an engine that was never ready. The next fork server imports nothing, so that it starts in time."""
    monkeypatch.setattr("reprise.generation.fork_server.PRELOAD", ())
    start_fork_server()
    stop_fork_server()
    try:
        async with started(directory, tokenizer, limits=HangLimits(start_timeout=5.0)) as engine:
            assert (engine.num_restarts, engine.state) == (1, EngineState.READY)
    finally:
        kill_fork_server()


async def test_one_whose_step_never_ends_is_killed_and_replaced(
    directory: Path, tokenizer: Tokenizer, counter: str, undisturbed: list[list[tuple[Any, ...]]]
) -> None:
    entry = armed(Fault("sleep", seconds=600, at_forward=20, times=1, counter=counter))
    async with started(directory, tokenizer, entry, HangLimits(step_timeout=1.5)) as engine:
        assert await answers(engine, requests(tokenizer)) == undisturbed
        assert (engine.num_restarts, engine.num_hung, engine.num_recovered) == (1, 1, 4)


async def test_one_whose_step_never_ends_is_replaced_though_nobody_waits_for_it_any_more(
    directory: Path, tokenizer: Tokenizer, counter: str, undisturbed: list[list[tuple[Any, ...]]]
) -> None:
    entry = armed(Fault("sleep", seconds=600, at_forward=20, times=1, counter=counter))
    async with started(directory, tokenizer, entry, HangLimits(step_timeout=1.5)) as engine:
        given_up = [engine.submit(request) for request in requests(tokenizer)]
        await until(lambda: Path(counter).exists())
        for stream in given_up:
            stream.close()
        await until(lambda: engine.num_restarts == 1 and engine.state is EngineState.READY)
        assert engine.num_hung == 1
        assert await answers(engine, requests(tokenizer)) == undisturbed


async def test_a_slow_step_is_no_hang(
    directory: Path, tokenizer: Tokenizer, counter: str, undisturbed: list[list[tuple[Any, ...]]]
) -> None:
    """The step takes twice as long as a heartbeat may; readiness sees that it makes no progress."""
    entry = armed(Fault("sleep", seconds=4, at_forward=20, times=1, counter=counter))
    async with started(directory, tokenizer, entry, HangLimits(heartbeat_timeout=2.0)) as engine:
        answering = asyncio.create_task(answers(engine, requests(tokenizer)))
        await until(lambda: Path(counter).exists())
        await asyncio.sleep(3.0)
        now = time.monotonic()
        assert now - engine.last_progress > 2.5
        assert now - engine.last_heartbeat < 2.0
        assert await answering == undisturbed
        assert engine.num_restarts == 0


async def test_a_short_stop_costs_time_only(
    directory: Path, tokenizer: Tokenizer, undisturbed: list[list[tuple[Any, ...]]]
) -> None:
    async with started(directory, tokenizer, limits=HangLimits(heartbeat_timeout=5.0)) as engine:
        answering = asyncio.create_task(answers(engine, requests(tokenizer)))
        await until(lambda: engine.stats.num_generated_tokens > 8)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGSTOP)
        await asyncio.sleep(2.0)
        assert not answering.done()
        os.kill(engine.pid, signal.SIGCONT)
        assert await answering == undisturbed
        assert engine.num_restarts == 0


async def test_one_that_hangs_while_loading_is_killed_and_replaced(
    directory: Path, tokenizer: Tokenizer, counter: str
) -> None:
    entry = armed(Fault("sleep", seconds=600, in_load=True, times=1, counter=counter))
    async with started(directory, tokenizer, entry, HangLimits(load_timeout=2.0)) as engine:
        assert (engine.num_hung, engine.state) == (1, EngineState.READY)


async def test_a_poisonous_request_is_given_up_and_the_others_go_on(
    directory: Path,
    tokenizer: Tokenizer,
    poison: int,
    undisturbed: list[list[tuple[Any, ...]]],
) -> None:
    async with started(directory, tokenizer, armed(Fault("abort", token_id=poison))) as engine:
        answering = asyncio.create_task(answers(engine, requests(tokenizer)))
        await until(lambda: engine.stats.num_generated_tokens > 8)
        bad = engine.submit(poisonous(tokenizer, poison, num_choices=2))
        with pytest.raises(GenerationError, match="ended the engine process 3 times") as raised:
            await collect(bad)
        assert raised.value.code == "internal_error"
        assert await answering == undisturbed
        assert (engine.num_restarts, engine.num_convicted, engine.num_lost) == (3, 1, 2)
        assert engine.num_recovered >= 4
        assert await answers(engine, requests(tokenizer)) == undisturbed
        assert engine.num_restarts == 3


async def test_who_is_beside_a_request_that_its_client_gives_up_is_not_taken_for_it(
    directory: Path, tokenizer: Tokenizer, poison: int, counter: str, undisturbed: list[list[tuple[Any, ...]]]
) -> None:
    """The engine hangs over it, its client loses patience and asks again, and again."""
    entry = armed(Fault("sleep", seconds=600, token_id=poison, counter=counter))
    async with started(directory, tokenizer, entry, HangLimits(step_timeout=0.5)) as engine:
        answering = asyncio.create_task(answers(engine, requests(tokenizer)[:1]))
        bad = engine.submit(poisonous(tokenizer, poison))
        for attempt in (1, 2):
            await until(lambda: Path(counter).exists() and Path(counter).stat().st_size == attempt)  # noqa: B023 # awaited here
            bad.close()
            await until(lambda: engine.num_restarts == attempt)  # noqa: B023 # awaited here
            if attempt == 1:
                bad = engine.submit(poisonous(tokenizer, poison))
        assert await answering == undisturbed[:1]
        assert (engine.num_restarts, engine.num_hung, engine.num_convicted) == (2, 2, 0)
        await until(lambda: not engine._leaving)


async def test_requests_that_come_during_a_trial_wait(
    directory: Path, tokenizer: Tokenizer, poison: int, undisturbed: list[list[tuple[Any, ...]]]
) -> None:
    """Two of them are poisonous; new ones come while the engine is down for the second time."""
    async with started(directory, tokenizer, armed(Fault("abort", token_id=poison))) as engine:
        bad = [engine.submit(poisonous(tokenizer, poison)) for _ in range(2)]
        await until(lambda: engine.num_restarts == 2)
        answering = asyncio.create_task(answers(engine, requests(tokenizer)))
        for stream in bad:
            with pytest.raises(GenerationError, match="ended the engine process"):
                await collect(stream)
        assert await answering == undisturbed
        assert engine.num_convicted == 2
        assert engine.num_restarts <= 5


async def test_a_poisonous_request_that_is_alone_needs_no_trial(
    directory: Path, tokenizer: Tokenizer, poison: int
) -> None:
    async with started(directory, tokenizer, armed(Fault("segfault", token_id=poison))) as engine:
        with pytest.raises(GenerationError, match="ended the engine process 2 times"):
            await collect(engine.submit(poisonous(tokenizer, poison)))
        assert (engine.num_restarts, engine.num_convicted) == (2, 1)
        await until(lambda: engine.state is EngineState.READY)


async def test_an_engine_that_is_killed_whenever_it_has_work_is_lost(
    directory: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests: of a kill from outside two of them are suspected before it is enough."""
    monkeypatch.setattr("reprise.generation.supervision.RESTART_DELAYS", (0.0,) * 4)
    monkeypatch.setattr("reprise.generation.supervision.MAX_DEATHS_IN_A_ROW", 6)
    armed_by = tmp_path / "armed"
    async with started(directory, tokenizer, armed(Fault("kill", armed_by=str(armed_by)))) as engine:
        streams = [engine.submit(request) for request in requests(tokenizer)]
        for stream in streams:
            await anext(stream)
        armed_by.touch()
        await until(lambda: engine.state is EngineState.FAILED)
        for stream in streams:
            with pytest.raises((UnavailableError, GenerationError), match=r"lost|ended the engine process 4 times"):
                await collect(stream)
        assert (engine.num_restarts, engine.num_convicted, engine.num_lost) == (7, 2, 4)
        stats = engine.stats
        assert (stats.num_running, stats.num_waiting, stats.num_kv_tokens_used) == (0, 0, 0)
        with pytest.raises(UnavailableError):
            engine.submit(requests(tokenizer)[0])


async def test_an_engine_that_is_killed_whenever_it_is_ready_is_lost(
    directory: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reprise.generation.supervision.RESTART_DELAYS", (0.0,) * 4)
    async with started(directory, tokenizer) as engine:
        killed: set[int] = set()
        while engine.state is not EngineState.FAILED:
            if engine.state is EngineState.READY and engine.pid is not None and engine.pid not in killed:
                os.kill(engine.pid, signal.SIGKILL)
                killed.add(engine.pid)
            await asyncio.sleep(0.01)
        assert len(killed) == engine.num_restarts == 4


async def test_a_model_that_is_gone_for_a_moment_is_loaded_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = save_servable(tmp_path / "llama")
    async with started(model, tokenizer) as engine:
        whole = await answers(engine, requests(tokenizer))
        answering = asyncio.create_task(answers(engine, requests(tokenizer)))
        await until(lambda: engine.stats.num_running > 0)
        model.rename(tmp_path / "elsewhere")
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: engine.num_restarts == 2)
        assert engine.state is EngineState.RECOVERING
        (tmp_path / "elsewhere").rename(model)
        assert await answering == whole


async def test_a_model_that_stays_away_is_the_end(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reprise.generation.supervision.RESTART_DELAYS", (0.0,) * 4)
    model = save_servable(tmp_path / "llama")
    async with started(model, tokenizer) as engine:
        stream = engine.submit(requests(tokenizer)[0])
        await anext(stream)
        model.rename(tmp_path / "elsewhere")
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(UnavailableError, match="lost"):
            await collect(stream)
        assert engine.state is EngineState.FAILED


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, ""),
        ({"load_seconds": 9.0}, ""),
        ({"weights_fingerprint": "other"}, "weights"),
        ({"model_config_fingerprint": "other"}, "configuration"),
        ({"deterministic": False}, "deterministic was True and is False"),
        ({"numerics_fingerprint": "other"}, "other bits"),
        ({"deterministic": False, "numerics_fingerprint": "other"}, "deterministic"),
    ],
)
async def test_streams_go_on_only_where_the_next_life_computes_the_same(
    changes: dict[str, Any], refused: str, directory: Path, tokenizer: Tokenizer
) -> None:
    from support.scripted_engine import READY

    engine = AsyncEngine(config(directory), tokenizer)
    engine.info = msgspec.structs.replace(READY, deterministic=True, numerics_fingerprint="0f")
    ready = msgspec.structs.replace(engine.info, **changes)
    if refused:
        with pytest.raises(ModelLoadError, match=refused):
            engine._check_same(ready)
    else:
        engine._check_same(ready)


def framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


def stepped(**output: Any) -> bytes:
    return MessageCodec[FromEngine](FromEngine).encode(StepOutput([SequenceOutput(**output)], EngineStats()))


@pytest.mark.parametrize(
    "frame",
    [
        (2**30).to_bytes(4, "big"),
        framed(b"\xc1 no message"),
        framed(b""),
        stepped(sequence_id=1, position=0)[:-3],
    ],
    ids=["oversized", "garbage", "empty", "torn"],
)
async def test_a_broken_channel_is_a_death(
    frame: bytes, directory: Path, tokenizer: Tokenizer, counter: str, undisturbed: list[list[tuple[Any, ...]]]
) -> None:
    entry = partial(faulty_engine.run_garbled, (frame,), counter)
    async with started(directory, tokenizer, entry) as engine:
        assert await answers(engine, requests(tokenizer)) == undisturbed
        assert (engine.num_restarts, engine.num_lost) == (1, 0)


async def test_outputs_for_nobody_are_dropped_and_counted(
    directory: Path, tokenizer: Tokenizer, counter: str, undisturbed: list[list[tuple[Any, ...]]]
) -> None:
    strange = (stepped(sequence_id=12345, position=0, token_ids=[5]), stepped(sequence_id=-1, position=7))
    entry = partial(faulty_engine.run_garbled, strange, counter)
    async with started(directory, tokenizer, entry) as engine:
        assert await answers(engine, requests(tokenizer)) == undisturbed
        assert (engine.num_restarts, engine.num_dropped) == (0, 2)


async def test_an_output_that_comes_twice_is_dropped_and_counted(directory: Path, tokenizer: Tokenizer) -> None:
    async with started(directory, tokenizer) as engine:
        stream = engine.submit(requests(tokenizer)[0])
        first = await anext(stream)
        (choice,) = engine._choices.values()
        assert choice.sequence_id is not None
        again = SequenceOutput(sequence_id=choice.sequence_id, position=0, token_ids=first.token_ids[:1])
        await engine._take_in([StepOutput([again], engine.stats)])
        rest = (await collect(stream))[0]
        assert len(first.token_ids) + len(rest.token_ids) == NUM_TOKENS
        assert engine.num_dropped == 1


async def test_missing_tokens_fail_their_request_alone(directory: Path, tokenizer: Tokenizer) -> None:
    async with started(directory, tokenizer) as engine:
        bad, good = (engine.submit(request) for request in requests(tokenizer)[:2])
        await anext(bad)
        choice = next(iter(engine._choices.values()))
        assert choice.sequence_id is not None
        later = SequenceOutput(sequence_id=choice.sequence_id, position=1000, token_ids=[5])
        await engine._take_in([StepOutput([later], engine.stats)])
        with pytest.raises(GenerationError, match="position 1000"):
            await collect(bad)
        assert len((await collect(good))[0].token_ids) == NUM_TOKENS
        assert engine.num_failed == {"internal_error": 1}
