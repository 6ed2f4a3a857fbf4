from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from reprise.api.running import RunningRequest
from reprise.errors import GenerationError, UnavailableError
from reprise.types import ChoiceDelta, FinishReason
from support.scripted_engine import Item, ScriptedStream

pytestmark = pytest.mark.anyio


def finished(index: int = 0, text: str = "") -> ChoiceDelta:
    return ChoiceDelta(index=index, text=text, finish_reason=FinishReason.STOP)


def running(
    *scripts: Sequence[Item] | None, num_choices: int = 1, timeout: float | None = None
) -> tuple[RunningRequest, list[ScriptedStream]]:
    streams = [ScriptedStream(script) for script in scripts]
    return RunningRequest(streams, num_choices=num_choices, timeout=timeout), streams


@pytest.mark.parametrize("num_prompts", [1, 2, 3])
async def test_every_delta_arrives_in_order_with_its_own_index(num_prompts: int) -> None:
    scripts = [
        [ChoiceDelta(index=j, text=f"{p}{j}{k}") for k in range(3) for j in range(2)] + [finished(0), finished(1)]
        for p in range(num_prompts)
    ]
    request, _ = running(*scripts, num_choices=2)
    seen: dict[int, list[str]] = {}
    async for delta in request:
        seen.setdefault(delta.index, []).append(delta.text)
    expected = {2 * p + j: [f"{p}{j}0", f"{p}{j}1", f"{p}{j}2", ""] for p in range(num_prompts) for j in range(2)}
    assert seen == expected


@pytest.mark.parametrize("num_prompts", [1, 2])
async def test_a_failure_in_one_prompt_ends_the_request(num_prompts: int) -> None:
    error = GenerationError("x", code="numerical_error")
    failing: list[Item] = [ChoiceDelta(index=0), error]
    scripts: list[Sequence[Item] | None] = [failing, None]
    request, streams = running(*scripts[:num_prompts])
    with pytest.raises(GenerationError) as raised:
        async for _ in request:
            pass
    assert raised.value is error
    request.close()
    assert all(stream.closed for stream in streams)


@pytest.mark.parametrize("num_prompts", [1, 2])
async def test_the_deadline(num_prompts: int) -> None:
    request, _ = running(*[None] * num_prompts, timeout=0.05)
    with pytest.raises(GenerationError) as raised:
        await anext(request)
    assert raised.value.code == "request_timeout"
    request.close()


@pytest.mark.parametrize("num_prompts", [1, 2])
async def test_fail_wakes_who_waits(num_prompts: int) -> None:
    request, _ = running(*[None] * num_prompts)
    waiting = asyncio.ensure_future(anext(request))
    await asyncio.sleep(0.01)
    request.fail(UnavailableError("bye"))
    with pytest.raises(UnavailableError, match="bye"):
        await waiting
    request.close()


async def test_fail_before_anybody_waits() -> None:
    request, _ = running([finished()])
    request.fail(UnavailableError("bye"))
    with pytest.raises(UnavailableError, match="bye"):
        await anext(request)


@pytest.mark.parametrize("num_prompts", [1, 2])
async def test_a_part_is_not_passed_off_as_the_whole(num_prompts: int) -> None:
    scripts: list[list[Item]] = [[ChoiceDelta(index=0, text="a")], [finished()]]
    request, _ = running(*scripts[:num_prompts])
    with pytest.raises(GenerationError) as raised:
        async for _ in request:
            pass
    assert raised.value.code == "incomplete"


async def test_close_is_idempotent() -> None:
    request, streams = running([finished()], [finished()])
    async for _ in request:
        pass
    request.close()
    request.close()
    assert all(stream.closed for stream in streams)
