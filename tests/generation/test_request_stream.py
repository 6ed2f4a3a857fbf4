"""The mailbox between the engine and a reader: merged while it is slow, ended once, closed once."""

from __future__ import annotations

import asyncio

import pytest

from reprise.generation.request_stream import RequestStream, merge
from reprise.types import ChoiceDelta, FinishReason, GenerationRequest, LogprobEntry, LogprobToken, SamplingParams

pytestmark = pytest.mark.anyio


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


async def test_an_error_comes_after_what_was_generated() -> None:
    stream, _ = make_stream()
    stream.put(delta("a"))
    stream.fail(RuntimeError("first"))
    stream.fail(RuntimeError("second"))
    assert (await anext(stream)).text == "a"
    with pytest.raises(RuntimeError, match="first"):
        await anext(stream)


async def test_a_waiting_reader_wakes_up_when_the_stream_is_closed() -> None:
    stream, closed = make_stream()
    waiting = asyncio.ensure_future(anext(stream, None))
    await asyncio.sleep(0)
    stream.close()
    stream.close()
    assert await asyncio.wait_for(waiting, 1.0) is None
    assert closed == [stream]


def test_merging_keeps_log_probabilities_in_order_and_the_last_reason() -> None:
    def entry(number: int) -> LogprobEntry:
        return LogprobEntry(LogprobToken(number, "t", b"t", -1.0))

    first = ChoiceDelta(index=0, text="a", logprobs=[entry(1)], prompt_logprobs=[None], num_cached_tokens=4)
    second = ChoiceDelta(index=0, text="b", logprobs=[entry(2)], finish_reason=FinishReason.STOP, stop_reason="x")
    merged = merge(first, second)
    assert merged.logprobs == [entry(1), entry(2)]
    assert (merged.text, merged.prompt_logprobs, merged.num_cached_tokens) == ("ab", [None], 4)
    assert (merged.finish_reason, merged.stop_reason) == (FinishReason.STOP, "x")
