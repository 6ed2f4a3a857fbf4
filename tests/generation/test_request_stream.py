"""The log between the engine and its readers: merged while they are slow, ended once, dropped when nobody needs it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

import pytest

from reprise.errors import GenerationError
from reprise.generation.request_stream import MAX_MERGED, Reader, RequestStream, fold, merge
from reprise.types import ChoiceDelta, FinishReason, GenerationRequest, LogprobEntry, LogprobToken, SamplingParams

pytestmark = pytest.mark.anyio

STOP: Literal[FinishReason.STOP] = FinishReason.STOP


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def make_stream(num_choices: int = 1) -> tuple[RequestStream, list[RequestStream]]:
    closed: list[RequestStream] = []
    sampling = SamplingParams(seed=0, max_tokens=9)
    request = GenerationRequest(request_id="r", prompt_token_ids=[1], sampling=sampling, num_choices=num_choices)
    return RequestStream(request, closed.append), closed


def delta(text: str, index: int = 0, reason: FinishReason | None = None) -> ChoiceDelta:
    finish = reason if reason in (FinishReason.STOP, FinishReason.LENGTH) else None
    return ChoiceDelta(index=index, text=text, token_ids=[len(text)], finish_reason=finish)


def put_all(stream: RequestStream, *texts: str, index: int = 0, last: FinishReason | None = STOP) -> None:
    for text in texts:
        stream.put(delta(text, index, last if text == texts[-1] else None))


async def texts_of(reader: Reader) -> list[tuple[int, str]]:
    return [(one.index, one.text) async for one in reader]


async def test_a_slow_reader_gets_one_delta_a_choice() -> None:
    stream, _ = make_stream(num_choices=2)
    for text in ("a", "b", "c"):
        stream.put(delta(text))
    stream.put(delta("x", index=1, reason=FinishReason.STOP))
    stream.put(delta("", reason=FinishReason.LENGTH))
    deltas = [d async for d in stream]
    assert [(d.index, d.text, d.token_ids, d.finish_reason) for d in deltas] == [
        (0, "abc", [1, 1, 1, 0], FinishReason.LENGTH),
        (1, "x", [1], FinishReason.STOP),
    ]


@pytest.mark.parametrize("retained", [False, True])
async def test_a_long_log_comes_in_parts_between_which_others_run(retained: bool) -> None:
    stream, _ = make_stream()
    stream.retained = retained
    reader, num_turns = Reader([stream]), 0

    async def other() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    for number in range(3 * MAX_MERGED + 1):
        stream.put(delta("a", reason=STOP if number == 3 * MAX_MERGED else None))
    beside = asyncio.create_task(other())
    texts = [one.text async for one in reader]
    beside.cancel()
    assert [len(text) for text in texts] == [MAX_MERGED] * 3 + [1]
    assert num_turns >= 3


async def test_an_error_comes_after_what_was_generated() -> None:
    stream, _ = make_stream()
    stream.put(delta("a"))
    stream.fail(RuntimeError("first"))
    stream.fail(RuntimeError("second"))
    assert (await anext(stream)).text == "a"
    with pytest.raises(RuntimeError, match="first"):
        await anext(stream)


async def test_a_waiting_reader_wakes_up_when_the_stream_is_closed() -> None:
    """And does not take a part for the whole."""
    stream, closed = make_stream()
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    stream.close()
    stream.close()
    with pytest.raises(GenerationError) as raised:
        await asyncio.wait_for(waiting, 1.0)
    assert raised.value.code == "incomplete"
    assert closed == [stream]


async def test_what_the_only_reader_has_passed_is_dropped() -> None:
    stream, _ = make_stream()
    reader = Reader([stream])
    put_all(stream, "a", "b", last=None)
    assert (await anext(reader)).text == "ab"
    assert not stream.complete
    with pytest.raises(ValueError, match="beginning"):
        Reader([stream])
    put_all(stream, "c")
    assert await texts_of(reader) == [(0, "c")]


async def test_a_retained_log_is_read_any_number_of_times() -> None:
    stream, _ = make_stream()
    stream.retained = True
    early = Reader([stream])
    put_all(stream, "a", "b", last=None)
    assert (await anext(early)).text == "ab"
    late = Reader([stream])
    put_all(stream, "c", "d")
    assert await texts_of(early) == [(0, "cd")]
    assert await texts_of(late) == [(0, "abcd")]
    assert await texts_of(Reader([stream])) == [(0, "abcd")]
    assert stream.num_entries == 4


async def test_two_readers_of_a_log_that_is_not_retained_both_get_all() -> None:
    stream, _ = make_stream()
    readers = [Reader([stream]), Reader([stream])]
    put_all(stream, "a", "b", last=None)
    assert (await anext(readers[0])).text == "ab"
    put_all(stream, "c")
    assert await texts_of(readers[1]) == [(0, "abc")]
    assert await texts_of(readers[0]) == [(0, "c")]


async def test_a_reader_that_left_is_told_nothing() -> None:
    stream, _ = make_stream()
    gone, stays = Reader([stream]), Reader([stream])
    gone.close()
    gone.close()
    put_all(stream, "a", last=None)
    assert (await anext(stays)).text == "a"
    assert not stream.complete


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
async def test_a_delta_ends_at_the_cut(cut: int) -> None:
    stream, _ = make_stream(num_choices=2)
    put_all(stream, "a", "b", "c", "d")
    put_all(stream, "x", "y", "z", index=1)
    found = await texts_of(Reader([stream], cuts={0: cut}))
    pieces = ["abcd"[:cut], "abcd"[cut:]]
    assert [text for index, text in found if index == 0] == [piece for piece in pieces if piece]
    assert [text for index, text in found if index == 1] == ["xyz"]


async def test_a_cut_is_met_however_the_tokens_come() -> None:
    stream, _ = make_stream()
    reader = Reader([stream], cuts={0: 3})
    found = []
    for texts in ("ab", "cd", "ef"):
        put_all(stream, *texts, last=STOP if texts == "ef" else None)
        found.append((await anext(reader)).text)
    assert found == ["ab", "c", "d"]
    assert await texts_of(reader) == [(0, "ef")]


@pytest.mark.parametrize("cut", [5, 9])
async def test_a_cut_that_is_never_met_is_an_error(cut: int) -> None:
    stream, _ = make_stream()
    put_all(stream, "a", "b")
    with pytest.raises(GenerationError) as raised:
        await texts_of(Reader([stream], cuts={0: cut}))
    assert raised.value.code == "cannot_resume"


async def test_a_cut_within_a_delta_is_an_error() -> None:
    stream, _ = make_stream()
    stream.put(ChoiceDelta(index=0, text="ab", token_ids=[1, 2], finish_reason=STOP))
    with pytest.raises(GenerationError) as raised:
        await texts_of(Reader([stream], cuts={0: 1}))
    assert raised.value.code == "cannot_resume"


async def test_the_end_is_told_once() -> None:
    ends: list[str] = []
    stream, _ = make_stream(num_choices=2)
    stream.on_end = lambda: ends.append("complete")
    put_all(stream, "a")
    assert not ends
    put_all(stream, "b", index=1)
    stream.fail(RuntimeError("late"))
    assert ends == ["complete"]
    stream, _ = make_stream()
    stream.on_end = lambda: ends.append("failed")
    stream.fail(RuntimeError("early"))
    stream.fail(RuntimeError("again"))
    assert ends == ["complete", "failed"]


@pytest.mark.parametrize("num_streams", [1, 2, 3])
async def test_choices_of_several_streams_have_their_own_index(num_streams: int) -> None:
    streams = [make_stream(num_choices=2)[0] for _ in range(num_streams)]
    reader = Reader(streams)
    seen: dict[int, str] = {}

    async def read() -> None:
        async for one in reader:
            seen[one.index] = seen.get(one.index, "") + one.text

    reading = asyncio.create_task(read())
    for part in ("0", "1", "2"):
        for s, stream in enumerate(streams):
            for j in range(2):
                stream.put(delta(f"{s}{j}{part} ", j, STOP if part == "2" else None))
        await asyncio.sleep(0)
    await asyncio.wait_for(reading, 1.0)
    assert seen == {2 * s + j: f"{s}{j}0 {s}{j}1 {s}{j}2 " for s in range(num_streams) for j in range(2)}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_a_failure_counts_more_than_what_it_cut_off(order: Sequence[int]) -> None:
    """One prompt failed, so the others were aborted: the reader hears why, in whatever order it looks."""
    streams = [make_stream()[0] for _ in range(2)]
    reader = Reader(streams)
    put_all(streams[order[0]], "a", last=None)
    streams[order[1]].fail(RuntimeError("why"))
    streams[order[0]].close()
    assert (await anext(reader)).text == "a"
    with pytest.raises(RuntimeError, match="why"):
        await anext(reader)


async def test_fail_wakes_who_waits_and_goes_before_what_is_unread() -> None:
    stream, _ = make_stream()
    reader = Reader([stream])
    waiting = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    reader.fail(RuntimeError("bye"))
    with pytest.raises(RuntimeError, match="bye"):
        await asyncio.wait_for(waiting, 1.0)
    put_all(stream, "a")
    with pytest.raises(RuntimeError, match="bye"):
        await anext(reader)


def test_merging_keeps_log_probabilities_in_order_and_the_last_reason() -> None:
    def entry(number: int) -> LogprobEntry:
        return LogprobEntry(LogprobToken(number, "t", b"t", -1.0))

    first = ChoiceDelta(index=0, text="a", logprobs=[entry(1)], prompt_logprobs=[None], num_cached_tokens=4)
    second = ChoiceDelta(index=0, text="b", logprobs=[entry(2)], finish_reason=FinishReason.STOP, stop_reason="x")
    merged = merge(first, second)
    assert merged.logprobs == [entry(1), entry(2)]
    assert (merged.text, merged.prompt_logprobs, merged.num_cached_tokens) == ("ab", [None], 4)
    assert (merged.finish_reason, merged.stop_reason) == (FinishReason.STOP, "x")
    assert (first.text, first.logprobs) == ("a", [entry(1)])
    assert fold([first]) is first
