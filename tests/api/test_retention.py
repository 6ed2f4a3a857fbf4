"""Which generations are held, and until when, with time and the engine in the test's hands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from reprise.api import retention
from reprise.api.admission import Admission
from reprise.api.event_ids import EventId, Origin
from reprise.api.generation import FIXED_ENTRIES, Generation, LogReader, Submitted
from reprise.api.head import ResponseHead
from reprise.api.retention import Generations, Slot
from reprise.errors import GenerationError, OverloadedError
from reprise.generation.request_stream import RequestStream
from reprise.protocol.requests import CompletionRequest
from reprise.protocol.responses import RepriseExtension
from reprise.types import ChoiceDelta, FinishReason, GenerationRequest, SamplingParams

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "LOOK_INTERVAL", 0.005)


class World:
    """Generations, and the admission that their tickets are of."""

    def __init__(self, *, max_entries: int = 10**6, timeout: float | None = None) -> None:
        self.generations = Generations(max_entries=max_entries, timeout=timeout)
        self.admission = Admission(max_num_seqs=100, max_waiting_seqs=0)
        self.number = 0

    def begin(self, *, num_prompts: int = 1, **facts: Any) -> tuple[Generation, LogReader]:
        self.number += 1
        sampling = SamplingParams(seed=0, max_tokens=9, **facts.pop("sampling", {}))
        request = GenerationRequest(request_id="r", prompt_token_ids=[1], sampling=sampling)
        submitted = Submitted(
            head=ResponseHead(
                id=facts.pop("response_id", f"cmpl-{self.number:032x}"),
                created=1,
                model="m",
                system_fingerprint="fp_" + bytes(8).hex(),
                extension=RepriseExtension(7, [], deterministic=True),
                num_prompt_tokens=(1,) * num_prompts,
                num_choices=1,
            ),
            parameters=CompletionRequest(prompt="a"),
            requests=[request] * num_prompts,
            streams=[RequestStream(request, lambda _: None) for _ in range(num_prompts)],
            ticket=self.admission.reserve(num_prompts),
            digest=b"digest",
            owner=facts.pop("owner", b""),
            **facts,
        )
        return self.generations.begin(submitted)

    def find(self, generation: Generation, *, owner: bytes = b"", digest: bytes = b"digest", **facts: Any) -> Any:
        head = generation.head
        values: dict[str, Any] = {
            "number": bytes(16),
            "created": 1,
            "seed": 7,
            "fingerprint": b"",
            "digest": b"",
            "prompts": b"",
        }
        sent = EventId(Origin(**(values | facts)), (), usage_sent=False)
        return self.generations.find(sent, head.id, owner=owner, digest=digest)


def finish(generation: Generation, *, num_tokens: int = 1) -> None:
    for stream in generation.submitted.streams:
        stream.put(ChoiceDelta(index=0, token_ids=[5] * num_tokens, finish_reason=FinishReason.STOP))


def put(generation: Generation, num_tokens: int) -> None:
    for _ in range(num_tokens):
        generation.submitted.streams[0].put(ChoiceDelta(index=0, token_ids=[5]))


async def read(reader: LogReader, num_tokens: int) -> None:
    """So many tokens; in its time, which is not before a look."""
    found = 0
    while found < num_tokens:
        found += len((await asyncio.wait_for(anext(reader), 5)).token_ids)
    assert found == num_tokens


async def look() -> None:
    await asyncio.sleep(0.05)


def aborted(generation: Generation) -> bool:
    return all(stream.closed for stream in generation.submitted.streams)


async def test_what_nobody_reads_is_aborted_at_once() -> None:
    world = World()
    generation, reader = world.begin()
    assert world.generations.read_now == {generation}
    assert not world.generations.idle.is_set()
    world.generations.leave(generation, reader)
    world.generations.leave(generation, reader)
    assert aborted(generation)
    assert (world.generations.read_now, world.admission.num_reserved) == (set(), 0)
    assert world.generations.idle.is_set()
    assert world.find(generation) is None


async def test_a_ticket_is_held_as_long_as_the_generation_runs_or_is_read() -> None:
    world = World()
    kept, reader = world.begin(retain_seconds=60)
    world.generations.leave(kept, reader)
    assert (world.admission.num_reserved, world.generations.num_kept) == (1, 1)
    finish(kept)
    await asyncio.sleep(0.01)
    assert (world.admission.num_reserved, world.generations.num_kept) == (0, 1)
    read, reader = world.begin(retain_seconds=60)
    assert (world.admission.num_reserved, world.admission.num_ended) == (1, 0)
    finish(read)
    await asyncio.sleep(0.01)
    assert (world.admission.num_reserved, world.admission.num_ended) == (1, 1)
    world.generations.leave(read, reader)
    assert (world.admission.num_reserved, world.admission.num_ended) == (0, 0)
    world.generations.drain()


@pytest.mark.parametrize("how", ["one fails", "late", "cut"])
async def test_a_ticket_ends_however_its_generation_does(how: str) -> None:
    world = World(timeout=0.02 if how == "late" else None)
    generation, reader = world.begin(num_prompts=2)
    if how == "one fails":
        generation.submitted.streams[0].fail(RuntimeError("why"))
    elif how == "cut":
        world.generations.fail_read(RuntimeError("bye"))
    await asyncio.sleep(0.05)
    assert (world.admission.num_reserved, world.admission.num_ended) == (2, 2)
    world.generations.leave(generation, reader)
    assert (world.admission.num_reserved, world.admission.num_ended) == (0, 0)


async def test_a_kept_generation_is_forgotten_in_its_time() -> None:
    world = World()
    generation, reader = world.begin(retain_seconds=0.1)
    world.generations.leave(generation, reader)
    await asyncio.sleep(0.02)
    # Its end does not begin the time anew, where it has no key.
    finish(generation)
    await asyncio.sleep(0.05)
    assert world.find(generation) is generation
    await asyncio.sleep(0.08)
    assert world.find(generation) is None
    assert world.generations.num_kept == 0


async def test_with_a_key_the_time_begins_at_its_end() -> None:
    world = World()
    generation, reader = world.begin(idempotency_slot=b"k", keep_seconds_after_end=0.15)
    world.generations.take_slot(b"k", b"digest").decide(generation)
    world.generations.leave(generation, reader)
    await asyncio.sleep(0.1)
    finish(generation)
    await asyncio.sleep(0.1)
    assert world.generations.slot(b"k") is not None
    await asyncio.sleep(0.15)
    assert world.generations.slot(b"k") is None


async def test_a_reader_that_comes_back_stops_the_time() -> None:
    world = World()
    generation, reader = world.begin(retain_seconds=0.05)
    world.generations.leave(generation, reader)
    again = world.generations.attach(generation)
    await asyncio.sleep(0.1)
    assert not aborted(generation)
    world.generations.leave(generation, again)
    await asyncio.sleep(0.1)
    assert aborted(generation)


@pytest.mark.parametrize(
    "other", [{"owner": b"x"}, {"digest": b"x"}, {"seed": 8}, {"created": 2}], ids=["owner", "digest", "seed", "time"]
)
async def test_only_the_same_client_finds_the_same_request(other: dict[str, Any]) -> None:
    world = World()
    generation, _ = world.begin(retain_seconds=60)
    assert world.find(generation) is generation
    assert world.find(generation, **other) is None


async def test_one_that_is_not_kept_is_not_found() -> None:
    world = World()
    generation, _ = world.begin()
    assert world.find(generation) is None
    assert not world.generations.holds(generation.head.id, owner=b"")


async def test_room_is_made_of_finished_ones_first_and_of_the_oldest() -> None:
    size = FIXED_ENTRIES + 1 + 10
    world = World(max_entries=2 * size)
    held = []
    for number in range(4):
        generation, reader = world.begin(retain_seconds=60)
        held.append(generation)
        if number:
            finish(generation, num_tokens=10)
            await asyncio.sleep(0.01)
        world.generations.leave(generation, reader)
    assert [world.find(generation) is generation for generation in held] == [True, False, False, True]
    assert [aborted(generation) for generation in held] == [False, True, True, False]
    world.generations.drain()
    assert world.generations.num_kept == 0


async def test_running_ones_go_where_there_is_nothing_else() -> None:
    world = World(max_entries=FIXED_ENTRIES + 1)
    (first, one), (second, two) = world.begin(retain_seconds=60), world.begin(retain_seconds=60)
    world.generations.leave(first, one)
    world.generations.leave(second, two)
    assert (aborted(first), aborted(second)) == (True, False)
    assert world.admission.num_reserved == 1
    world.generations.drain()


@pytest.mark.parametrize(
    ("facts", "size"),
    [
        ({"num_body_bytes": 4000}, 1000),
        ({"sampling": {"allowed_token_ids": tuple(range(300))}}, 300),
        ({"sampling": {"logit_bias": dict.fromkeys(range(200), 1.0)}}, 200),
        ({"sampling": {"bad_words": (b"a" * 400,) * 2}}, 202),
    ],
    ids=["body", "allowed", "bias", "words"],
)
async def test_what_a_request_brings_counts_too(facts: dict[str, Any], size: int) -> None:
    for room, num_kept in ((size, 1), (size - 1, 0)):
        world = World(max_entries=FIXED_ENTRIES + 1 + room)
        world.generations.leave(*world.begin(retain_seconds=60, **facts))
        assert world.generations.num_kept == num_kept
        world.generations.drain()


async def test_what_is_read_again_takes_room_too() -> None:
    world = World(max_entries=2 * FIXED_ENTRIES)
    first, reader = world.begin(retain_seconds=60)
    world.generations.leave(first, reader)
    again = world.generations.attach(first)
    world.generations.leave(*world.begin(retain_seconds=60))
    assert world.generations.num_kept == 0
    world.generations.leave(first, again)
    assert world.generations.num_kept == 1
    world.generations.drain()


async def test_what_grows_while_nobody_reads_takes_room_as_it_grows() -> None:
    world = World(max_entries=FIXED_ENTRIES + 1 + 10)
    generation, reader = world.begin(retain_seconds=60)
    world.generations.leave(generation, reader)
    put(generation, 10)
    await look()
    assert world.find(generation) is generation
    put(generation, 1)
    await look()
    assert aborted(generation)
    assert (world.generations.num_kept, world.admission.num_reserved) == (0, 0)


async def test_what_is_read_while_it_grows_is_kept_no_longer_than_there_is_room() -> None:
    """Who reads it reads on, and what was read is dropped; for others it is gone."""
    world = World(max_entries=FIXED_ENTRIES + 1 + 10)
    generation, reader = world.begin(retain_seconds=60, idempotency_slot=b"k", keep_seconds_after_end=60)
    world.generations.take_slot(b"k", b"digest").decide(generation)
    stream = generation.submitted.streams[0]
    put(generation, 8)
    await read(reader, 8)
    await look()
    assert (world.find(generation), stream.complete) == (generation, True)
    put(generation, 3)
    await look()
    assert world.find(generation) is None
    assert world.generations.slot(b"k") is None
    assert not aborted(generation)
    assert not stream.complete
    put(generation, 5)
    await read(reader, 8)
    finish(generation)
    await read(reader, 1)
    with pytest.raises(StopAsyncIteration):
        await anext(reader)
    world.generations.leave(generation, reader)
    assert (world.generations.num_kept, world.admission.num_reserved) == (0, 0)


async def test_one_that_there_was_no_room_for_ends_with_its_reader() -> None:
    world = World(max_entries=0)
    generation, reader = world.begin(retain_seconds=60)
    await look()
    world.generations.leave(generation, reader)
    assert aborted(generation)


async def test_what_somebody_has_not_read_is_not_dropped() -> None:
    world = World(max_entries=0)
    generation, fast = world.begin(retain_seconds=60)
    slow = world.generations.attach(generation)
    stream = generation.submitted.streams[0]
    put(generation, 4)
    await read(fast, 4)
    await look()
    put(generation, 4)
    assert (world.find(generation), stream.complete) == (None, True)
    await read(fast, 4)
    await read(slow, 8)
    world.generations.leave(generation, fast)
    assert not stream.complete
    put(generation, 4)
    finish(generation)
    await read(slow, 5)
    world.generations.leave(generation, slow)
    assert world.generations.idle.is_set()


async def test_a_log_that_is_recorded_stays_whole() -> None:
    world = World(max_entries=0)
    recorded: list[int] = []

    def record(generation: Generation) -> None:
        generation.keep_log()
        generation.on_end.append(lambda one: recorded.extend(one.choices()[0].token_ids))

    world.generations.on_begin.append(record)
    generation, reader = world.begin(retain_seconds=60)
    put(generation, 4)
    await read(reader, 4)
    await look()
    assert world.find(generation) is None
    put(generation, 4)
    finish(generation)
    await look()
    assert recorded == [5] * 9


async def test_what_nobody_reads_goes_before_what_somebody_does() -> None:
    world = World(max_entries=2 * (FIXED_ENTRIES + 1))
    held = [world.begin(retain_seconds=60) for _ in range(2)]
    unread, reader = world.begin(retain_seconds=60)
    world.generations.leave(unread, reader)
    await look()
    assert world.find(unread) is None
    assert [world.find(generation) is generation for generation, _ in held] == [True, True]
    put(held[1][0], 1)
    await look()
    assert [world.find(generation) is generation for generation, _ in held] == [False, True]
    assert not any(aborted(generation) for generation, _ in held)


async def test_who_reads_what_is_finished_again_keeps_it() -> None:
    """It has no ticket any more: what it holds has to count as long as it is there."""
    world = World(max_entries=FIXED_ENTRIES + 1 + 10)
    generation, reader = world.begin(retain_seconds=60)
    finish(generation, num_tokens=10)
    await look()
    world.generations.leave(generation, reader)
    again = world.generations.attach(generation)
    other, _ = world.begin(retain_seconds=60)
    await look()
    assert [world.find(one) is one for one in (generation, other)] == [True, False]
    await read(again, 10)


async def test_an_id_that_another_client_names_is_found_by_each_for_itself() -> None:
    world = World()
    first, _ = world.begin(retain_seconds=60, owner=b"a", response_id="cmpl-1")
    other, reader = world.begin(retain_seconds=60, owner=b"b", response_id="cmpl-1")
    again, leaving = world.begin(retain_seconds=60, owner=b"a", response_id="cmpl-1")
    assert world.find(first, owner=b"a") is first
    assert world.find(first, owner=b"b") is other
    world.generations.drain()
    world.generations.leave(other, reader)
    world.generations.leave(again, leaving)
    assert world.find(first, owner=b"a") is first
    assert world.find(first, owner=b"b") is None


async def test_who_reads_slowly_what_is_complete_is_in_time() -> None:
    world = World(timeout=0.02)
    generation, reader = world.begin()
    finish(generation)
    await asyncio.sleep(0.05)
    assert (await anext(reader)).token_ids == [5]
    world.generations.leave(generation, reader)


async def test_who_leaves_with_the_end_does_not_cancel_it() -> None:
    world = World()
    generation, reader = world.begin()
    generation.submitted.streams[0].fail(RuntimeError("why"))
    world.generations.leave(generation, reader)
    assert isinstance(generation.error, RuntimeError)


async def test_one_failed_prompt_ends_the_others() -> None:
    world = World()
    generation, reader = world.begin(num_prompts=2, retain_seconds=60)
    generation.submitted.streams[1].fail(RuntimeError("why"))
    with pytest.raises(RuntimeError, match="why"):
        await anext(reader)
    await asyncio.sleep(0.01)
    assert aborted(generation)
    assert world.find(generation) is None
    world.generations.leave(generation, reader)
    assert (world.admission.num_reserved, world.generations.num_kept) == (0, 0)


async def test_a_kept_one_that_fails_is_forgotten() -> None:
    world = World()
    generation, reader = world.begin(retain_seconds=60)
    world.generations.leave(generation, reader)
    generation.submitted.streams[0].fail(RuntimeError("why"))
    await asyncio.sleep(0.01)
    assert (world.admission.num_reserved, world.generations.num_kept) == (0, 0)


async def test_the_time_that_a_request_may_take() -> None:
    world = World(timeout=0.05)
    generation, reader = world.begin()
    kept, leaving = world.begin(retain_seconds=60)
    world.generations.leave(kept, leaving)
    with pytest.raises(GenerationError) as raised:
        await asyncio.wait_for(anext(reader), 5)
    assert raised.value.code == "request_timeout"
    assert aborted(generation)
    for _ in range(500):  # it began a little later
        if not aborted(kept):
            await asyncio.sleep(0.01)
    assert aborted(kept)
    world.generations.leave(generation, reader)
    assert (world.admission.num_reserved, world.generations.num_kept) == (0, 0)


async def test_a_drain_keeps_nothing_from_then_on() -> None:
    world = World()
    kept, leaving = world.begin(retain_seconds=60)
    read, reader = world.begin(retain_seconds=60)
    world.generations.leave(kept, leaving)
    world.generations.drain()
    assert (aborted(kept), aborted(read)) == (True, False)
    world.generations.leave(read, reader)
    assert aborted(read)
    assert world.generations.idle.is_set()


def end_complete(generation: Generation, _: World) -> None:
    finish(generation)


def end_failed(generation: Generation, _: World) -> None:
    generation.submitted.streams[0].fail(RuntimeError("why"))


def end_left(generation: Generation, world: World) -> None:
    for reader in list(generation.readers):
        world.generations.leave(generation, reader)


def end_cut(_: Generation, world: World) -> None:
    world.generations.fail_read(RuntimeError("bye"))


@pytest.mark.parametrize("how", [end_complete, end_failed, end_left, end_cut])
async def test_who_watches_hears_of_the_beginning_and_once_of_the_end(how: Callable[[Generation, World], None]) -> None:
    world = World()
    ends: list[tuple[str, str]] = []

    def watch(generation: Generation) -> None:
        generation.keep_log()
        generation.on_end.append(lambda one: ends.append((type(one.error).__name__, one.choices()[0].text)))

    world.generations.on_begin.append(watch)
    generation, reader = world.begin()
    for text in ("a", "b"):
        generation.submitted.streams[0].put(ChoiceDelta(index=0, text=text, token_ids=[5]))
    assert (await anext(reader)).text == "ab"
    how(generation, world)
    await asyncio.sleep(0.01)
    world.generations.leave(generation, reader)
    await asyncio.sleep(0.01)
    expected = {"end_complete": "NoneType", "end_left": "GenerationError"}.get(how.__name__, "RuntimeError")
    assert ends == [(expected, "ab")]


async def test_no_more_wait_for_a_first_one_than_is_bounded() -> None:
    slot = Slot(b"")
    waiting = [asyncio.create_task(slot.wait()) for _ in range(16)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await slot.wait()
    slot.decide(None)
    assert await asyncio.gather(*waiting) == [None] * 16
