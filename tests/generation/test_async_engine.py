"""The asyncio side against a real engine process: streams, aborts, deaths, failed loads."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from reprise.errors import GenerationError, ModelLoadError, UnavailableError
from reprise.generation.async_engine import DELIVERED_AT_ONCE, AsyncEngine
from reprise.generation.interface import EngineState
from reprise.generation.request_stream import RequestStream, merge
from reprise.ipc.messages import EngineConfig, LoadProgress, SequenceOutput, StepOutput
from reprise.text.tokenizer import Tokenizer
from reprise.types import ChoiceDelta, FinishReason, GenerationRequest, SamplingParams, StopStrings
from support.servable import save_servable

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_servable(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(str(directory))


def config(directory: Path, **changes: Any) -> EngineConfig:
    values = {
        "model": str(directory),
        "device": "cpu",
        "kv_cache_memory": 1 << 20,
        "num_threads": 1,
        **changes,
    }
    return EngineConfig(**values)


@pytest.fixture(scope="module")
async def engine(directory: Path, tokenizer: Tokenizer) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(config(directory), tokenizer)
    await engine.start()
    yield engine
    await engine.stop()


def request(tokenizer: Tokenizer, text: str = "The quick brown", **changes: Any) -> GenerationRequest:
    fields = {name: changes.pop(name) for name in ("num_choices", "stop") if name in changes}
    sampling = {"seed": 3, "max_tokens": 20, **changes}
    return GenerationRequest(
        request_id="r",
        prompt_token_ids=tokenizer.encode(text, add_special_tokens=True),
        sampling=SamplingParams(**sampling),
        **fields,
    )


async def collect(stream: RequestStream) -> dict[int, ChoiceDelta]:
    """The fold of a stream, choice by choice."""
    folded: dict[int, ChoiceDelta] = {}
    async for delta in stream:
        previous = folded.get(delta.index)
        folded[delta.index] = delta if previous is None else merge(previous, delta)
    return folded


async def idle(engine: AsyncEngine, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stats = engine.stats
        if stats.num_running == stats.num_waiting == stats.num_kv_tokens_used == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"the engine is not idle: {engine.stats}")


async def test_a_request_gives_text_that_its_tokens_spell(engine: AsyncEngine, tokenizer: Tokenizer) -> None:
    folded = await collect(engine.submit(request(tokenizer, end_token_ids=(), num_choices=2)))
    assert set(folded) == {0, 1}
    for delta in folded.values():
        assert len(delta.token_ids) == 20
        assert delta.finish_reason is FinishReason.LENGTH
        spelt = b"".join(
            tokenizer.vocabulary.data(i) for i in delta.token_ids if i not in tokenizer.vocabulary.special_token_ids
        )
        assert delta.text == spelt.decode(errors="replace")
    assert folded[0].token_ids != folded[1].token_ids


async def test_the_same_request_twice_gives_the_same_and_reuses_the_prompt(
    engine: AsyncEngine, tokenizer: Tokenizer
) -> None:
    long = request(tokenizer, "jumps over the lazy dog. " * 5, end_token_ids=())
    first = await collect(engine.submit(long))
    second = await collect(engine.submit(long))
    assert second[0].text == first[0].text
    assert second[0].token_ids == first[0].token_ids
    assert second[0].num_cached_tokens > first[0].num_cached_tokens


async def test_many_at_once_equal_each_alone(engine: AsyncEngine, tokenizer: Tokenizer) -> None:
    requests = [
        request(tokenizer, "dog" * (1 + i % 5), seed=i, max_tokens=5 + i, end_token_ids=(), use_cache=i % 3 > 0)
        for i in range(12)
    ]
    alone = [(await collect(engine.submit(r)))[0].token_ids for r in requests]
    together = await asyncio.gather(*(collect(engine.submit(r)) for r in requests))
    assert [folded[0].token_ids for folded in together] == alone


async def test_a_stop_string_ends_the_choice_and_frees_its_slot(engine: AsyncEngine, tokenizer: Tokenizer) -> None:
    whole = (await collect(engine.submit(request(tokenizer, end_token_ids=(), max_tokens=40))))[0].text
    stop = whole[10:13]
    cut = (
        await collect(engine.submit(request(tokenizer, end_token_ids=(), max_tokens=40, stop=StopStrings((stop,)))))
    )[0]
    assert cut.text == whole[: whole.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == (FinishReason.STOP, stop)
    await idle(engine)


async def test_a_closed_stream_frees_its_slot_within_a_moment(engine: AsyncEngine, tokenizer: Tokenizer) -> None:
    before = engine.stats.num_generated_tokens
    stream = engine.submit(request(tokenizer, end_token_ids=(), max_tokens=230, num_choices=3))
    await anext(stream)
    stream.close()
    stream.close()
    await idle(engine)
    assert engine.stats.num_generated_tokens - before < 3 * 230


async def test_a_slow_reader_finds_its_deltas_merged(engine: AsyncEngine, tokenizer: Tokenizer) -> None:
    stream = engine.submit(request(tokenizer, end_token_ids=(), max_tokens=50))
    await idle(engine)
    deltas = [delta async for delta in stream]
    assert sum(len(delta.token_ids) for delta in deltas) == 50
    assert len(deltas) < 10


async def test_others_run_between_the_outputs_of_a_large_step(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivered: list[SequenceOutput] = []
    monkeypatch.setattr(engine, "_deliver", delivered.append)
    steps = [
        StepOutput([SequenceOutput(sequence_id=-n, position=p) for n in range(1, 4 * DELIVERED_AT_ONCE)], engine.stats)
        for p in (0, 1)
    ]
    seen = []

    async def look() -> None:
        while True:
            seen.append(len(delivered))
            await asyncio.sleep(0)

    looking = asyncio.create_task(look())
    await engine._take_in(steps)
    looking.cancel()
    assert [(output.sequence_id, output.position) for output in delivered] == [
        (-n, p) for n in range(1, 4 * DELIVERED_AT_ONCE) for p in (0, 1)
    ]
    assert seen == [2 * DELIVERED_AT_ONCE, 4 * DELIVERED_AT_ONCE, 6 * DELIVERED_AT_ONCE]


async def test_a_choice_that_cannot_go_on_fails_its_request_alone(engine: AsyncEngine, tokenizer: Tokenizer) -> None:
    only = tokenizer.encode("dog", add_special_tokens=False)[0]
    word = tokenizer.vocabulary.data(only)
    impossible = request(tokenizer, allowed_token_ids=(only,), bad_words=(word,), end_token_ids=())
    good = engine.submit(request(tokenizer, end_token_ids=()))
    with pytest.raises(GenerationError, match="leave no token"):
        await collect(engine.submit(impossible))
    assert len((await collect(good))[0].token_ids) == 20
    await idle(engine)


async def test_a_killed_engine_is_a_pause(directory: Path, tokenizer: Tokenizer) -> None:
    engine = AsyncEngine(config(directory), tokenizer)
    await engine.start()
    try:
        requests = [
            request(tokenizer, seed=i, max_tokens=120, end_token_ids=(), temperature=float(i % 2)) for i in range(4)
        ]
        expected = [(await collect(engine.submit(r)))[0] for r in requests]
        streams = [engine.submit(r) for r in requests]
        firsts = [await anext(stream) for stream in streams]
        pid = engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        for first, stream, whole in zip(firsts, streams, expected, strict=True):
            rest = (await collect(stream))[0]
            assert first.token_ids + rest.token_ids == whole.token_ids
            assert first.text + rest.text == whole.text
        assert engine.num_restarts == 1
        assert engine.state is EngineState.READY
    finally:
        await engine.stop()


async def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path, directory: Path, tokenizer: Tokenizer) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    engine = AsyncEngine(config(tmp_path), tokenizer)
    with pytest.raises(ModelLoadError, match="safetensors"):
        await engine.start()
    assert engine.state is EngineState.FAILED
    with pytest.raises(UnavailableError):
        engine.submit(request(tokenizer))
    await engine.stop()


async def test_loading_reports_progress_and_what_was_loaded(directory: Path, tokenizer: Tokenizer) -> None:
    heard: list[LoadProgress] = []
    engine = AsyncEngine(config(directory), tokenizer, on_progress=heard.append)
    await engine.start()
    try:
        assert [p.fraction for p in heard] == sorted(p.fraction for p in heard)
        assert engine.info is not None
        assert (engine.info.tier, engine.info.device, engine.info.dtype) == ("paged", "cpu", "float32")
        assert engine.info.max_sequence_tokens == 256
    finally:
        await engine.stop()
    with pytest.raises(UnavailableError):
        engine.submit(request(tokenizer))


async def test_stopping_ends_what_is_in_flight(directory: Path, tokenizer: Tokenizer) -> None:
    engine = AsyncEngine(config(directory), tokenizer)
    await engine.start()
    pid = engine.pid
    assert pid is not None
    stream = engine.submit(request(tokenizer, end_token_ids=(), max_tokens=200))
    await anext(stream)
    await engine.stop()
    with pytest.raises(UnavailableError):
        await collect(stream)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_tokens_that_cannot_be_made_into_text_fail_their_request_alone(
    engine: AsyncEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = engine.submit(request(tokenizer, end_token_ids=()))
    (choice,) = engine._choices.values()

    def push(_output: object) -> None:
        raise IndexError("a bug")

    monkeypatch.setattr(choice.processor, "push", push)
    with pytest.raises(GenerationError, match="text"):
        await collect(stream)
    assert len((await collect(engine.submit(request(tokenizer, end_token_ids=()))))[0].token_ids) == 20
    await idle(engine)


async def test_an_engine_that_dies_while_loading_is_given_up(
    directory: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reprise.generation.supervision.RESTART_DELAYS", (0.0,) * 4)
    engine = AsyncEngine(config(directory), tokenizer)

    def kill(_progress: LoadProgress) -> None:
        pid = engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    engine._on_progress = kill
    with pytest.raises(ModelLoadError, match="died 4 times"):
        await engine.start()
    assert engine.state is EngineState.FAILED
    await engine.stop()


async def test_stopping_while_loading_ends_the_start(directory: Path, tokenizer: Tokenizer) -> None:
    engine = AsyncEngine(config(directory), tokenizer)
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0.01)
    await engine.stop()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(starting, 5.0)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_to_the_whole_group_does_not_end_the_engine(
    engine: AsyncEngine, tokenizer: Tokenizer, signal_number: signal.Signals
) -> None:
    """A drain needs it: the API process alone decides when the engine ends."""
    before = engine.num_restarts
    stream = engine.submit(request(tokenizer, end_token_ids=(), max_tokens=100))
    await anext(stream)
    assert engine.pid is not None
    os.kill(engine.pid, signal_number)
    assert (await collect(stream))[0].finish_reason is FinishReason.LENGTH
    assert engine.num_restarts == before


@pytest.mark.parametrize("size", [None, 1 << 20])
def test_only_memory_whose_size_was_given_is_taken_early(
    directory: Path, tokenizer: Tokenizer, size: int | None
) -> None:
    engine = AsyncEngine(config(directory, kv_cache_memory=size), tokenizer)
    assert engine._start_message.reserve_kv_cache == (size is not None)
