"""Any cut of any stream: what a client had before, and what it is sent after, is the whole stream once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reprise.api import event_ids
from reprise.api.chat_chunks import ChatChunks
from reprise.api.completion_chunks import CompletionChunks
from reprise.api.event_ids import EventId, EventIdWriter
from reprise.api.event_writer import EventWriter
from reprise.api.head import ResponseHead
from reprise.errors import GenerationError
from reprise.generation.output_processor import OutputProcessor
from reprise.generation.request_stream import Reader, RequestStream
from reprise.ipc.messages import SequenceOutput
from reprise.protocol.requests import ChatCompletionRequest, CompletionRequest
from reprise.protocol.responses import RepriseExtension
from reprise.text.tokenizer import Tokenizer
from reprise.types import (
    ChoiceDelta,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    StopStrings,
    TokenLogprobs,
)
from support.live_api import Answer, of_events
from support.loopback import events_with_ids

TEXTS = ["Stop here, or stop there!", "你好🙂👩🏽‍🚀, e\u0301 and ä.", "x", "def main(): return 7"]
STOPS = [(), ("stop", "there"), ("🙂",), ("or s",)]


class Case(NamedTuple):
    """A request, and what the engine answers to each of its choices: token ids."""

    chat: bool
    num_prompts: int
    num_choices: int
    stop: tuple[str, ...]
    logprobs: bool
    token_ids: bool
    echo: bool
    include_usage: bool
    texts: list[int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    chat = draw(st.booleans())
    num_prompts, num_choices = 1 if chat else draw(st.integers(1, 2)), draw(st.integers(1, 2))
    return Case(
        chat=chat,
        num_prompts=num_prompts,
        num_choices=num_choices,
        stop=draw(st.sampled_from(STOPS)),
        logprobs=draw(st.booleans()),
        token_ids=draw(st.booleans()),
        echo=not chat and draw(st.booleans()),
        include_usage=draw(st.booleans()),
        texts=[draw(st.integers(0, len(TEXTS) - 1)) for _ in range(num_prompts * num_choices)],
    )


def requests_of(case: Case, tokenizer: Tokenizer) -> list[GenerationRequest]:
    sampling = SamplingParams(seed=1, max_tokens=99, num_logprobs=1 if case.logprobs else None)
    prompt = tokenizer.encode("prompt", add_special_tokens=False)
    return [
        GenerationRequest(
            request_id=str(number),
            prompt_token_ids=prompt,
            sampling=sampling,
            num_choices=case.num_choices,
            stop=StopStrings(case.stop),
        )
        for number in range(case.num_prompts)
    ]


def deltas_of(case: Case, tokenizer: Tokenizer, requests: list[GenerationRequest]) -> list[list[ChoiceDelta]]:
    """Of each choice, what the engine's tokens become, one delta a token."""
    found = []
    for number, text in enumerate(case.texts):
        request = requests[number // case.num_choices]
        index = number % case.num_choices
        processor = OutputProcessor(index, request, tokenizer)
        token_ids = tokenizer.encode(TEXTS[text], add_special_tokens=False)
        deltas: list[ChoiceDelta] = []
        for position, token_id in enumerate(token_ids):
            scored = TokenLogprobs(token_id, -0.5 - position, [(token_id, -0.25)])
            prompt = [None, *(TokenLogprobs(i, -1.0, []) for i in request.prompt_token_ids[1:])]
            output = SequenceOutput(
                sequence_id=1,
                position=position,
                token_ids=[token_id],
                logprobs=[scored] if case.logprobs else None,
                prompt_logprobs=prompt if case.echo and case.logprobs and position == 0 else None,
                finish_reason=FinishReason.LENGTH if position == len(token_ids) - 1 else None,
            )
            delta = processor.push(output)
            if delta is not None:
                deltas.append(delta)
            if processor.finished:
                break
        found.append(deltas)
    return found


async def stream_of(
    case: Case, tokenizer: Tokenizer, *, choose: Callable[[int], int], sent: EventId | None = None
) -> list[tuple[dict[str, Any], str]]:
    """The events with their ids; `choose` decides which choice goes on, and how many deltas wait to be merged."""
    requests = requests_of(case, tokenizer)
    streams = [RequestStream(request, lambda _: None) for request in requests]
    reader = Reader(streams, cuts=None if sent is None else event_ids.cuts(sent.positions))
    head = ResponseHead(
        id="cmpl-" + bytes(16).hex(),
        created=1,
        model="m",
        system_fingerprint="fp_" + bytes(8).hex(),
        extension=RepriseExtension(7, [], deterministic=True),
        num_prompt_tokens=tuple(len(request.prompt_token_ids) for request in requests),
        num_choices=case.num_choices,
    )
    chunks: ChatChunks | CompletionChunks
    if case.chat:
        body: dict[str, Any] = {"messages": [], "logprobs": case.logprobs, "return_token_ids": case.token_ids}
        wanted = ChatCompletionRequest.model_construct(**body)
        chunks = ChatChunks(head, wanted, include_usage=case.include_usage)
    else:
        body = {
            "prompt": ["prompt"] * case.num_prompts,
            "logprobs": 1 if case.logprobs else None,
            "echo": case.echo,
            "return_token_ids": case.token_ids,
        }
        parsed = CompletionRequest.model_validate(body)
        chunks = CompletionChunks(head, parsed, requests, tokenizer.vocabulary, include_usage=case.include_usage)
    if sent is not None:
        chunks.omit_extension()
    origin = event_ids.Origin(
        number=bytes(16), created=1, seed=7, fingerprint=bytes(8), digest=bytes(8), prompts=bytes(4)
    )
    writer = EventWriter(EventIdWriter(origin, len(case.texts)), sent)
    queues = {number: deltas for number, deltas in enumerate(deltas_of(case, tokenizer, requests)) if deltas}
    written, num_read = b"", 0
    while queues:
        for _ in range(1 + choose(4)):
            if queues:
                number = list(queues)[choose(len(queues))]
                streams[number // case.num_choices].put(queues[number].pop(0))
                queues = {key: left for key, left in queues.items() if left}
        async with asyncio.timeout(5):
            written += writer.write(chunks.push(await anext(reader)))
            num_read += 1
    async for delta in reader:
        written += writer.write(chunks.push(delta))
    written += writer.write(chunks.end())
    found = events_with_ids(written.decode())
    return [(event, event_id or "") for event, event_id in found]


def folded(case: Case, events: list[dict[str, Any]]) -> Answer:
    """The response that a client makes of them; each member that comes once is in one event."""
    roles = [c["index"] for e in events for c in e["choices"] if "role" in c.get("delta", {})]
    assert sorted(roles) == (list(range(len(case.texts))) if case.chat else [])
    assert ["reprise" in event for event in events] == [True] + [False] * (len(events) - 1)
    assert sum(bool(event.get("usage")) for event in events) == case.include_usage
    return of_events([*events, "[DONE]"])


@settings(max_examples=150, deadline=None)
@given(cases(), st.randoms(use_true_random=False), st.data())
def test_any_cut_of_any_stream(tokenizer: Tokenizer, case: Case, random: Any, data: st.DataObject) -> None:
    def choose(limit: int) -> int:
        return int(random.randrange(limit))

    whole = asyncio.run(stream_of(case, tokenizer, choose=choose))
    expected = folded(case, [event for event, _ in whole])
    assert len({event_id for _, event_id in whole}) == len(whole)
    for _ in range(3):
        cut = data.draw(st.integers(1, len(whole)))
        sent = event_ids.parse(whole[cut - 1][1])
        rest = asyncio.run(stream_of(case, tokenizer, choose=choose, sent=sent))
        assert folded(case, [event for event, _ in whole[:cut] + rest]) == expected


@pytest.mark.parametrize("chat", [True, False])
def test_every_cut_of_a_stream_cut_twice(tokenizer: Tokenizer, chat: bool) -> None:
    """The ids of a resumed stream are as good as those of the first one."""
    case = Case(chat, 1 if chat else 2, 2, ("stop",), True, True, not chat, True, [0, 1] if chat else [0, 1, 2, 3])
    whole = asyncio.run(stream_of(case, tokenizer, choose=lambda limit: limit - 1))
    expected = folded(case, [event for event, _ in whole])
    for first in range(1, len(whole)):
        sent = event_ids.parse(whole[first - 1][1])
        middle = asyncio.run(stream_of(case, tokenizer, choose=lambda _: 0, sent=sent))
        for second in range(1, len(middle), 3):
            sent = event_ids.parse(middle[second - 1][1])
            last = asyncio.run(stream_of(case, tokenizer, choose=lambda limit: limit // 2, sent=sent))
            assert folded(case, [event for event, _ in whole[:first] + middle[:second] + last]) == expected


def test_a_place_that_the_answer_does_not_have(tokenizer: Tokenizer) -> None:
    """A client may not be sent something else as if it were the rest."""
    case = Case(True, 1, 1, (), False, False, False, False, [0])
    forged = EventId(
        event_ids.Origin(number=bytes(16), created=1, seed=7, fingerprint=bytes(8), digest=bytes(8), prompts=bytes(4)),
        (event_ids.Position(90, event_ids.Phase.BEGUN),),
        usage_sent=False,
    )
    with pytest.raises(GenerationError) as raised:
        asyncio.run(stream_of(case, tokenizer, choose=lambda _: 0, sent=forged))
    assert raised.value.code == "cannot_resume"
