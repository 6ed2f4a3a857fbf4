"""The cells: prompts of the length that they say, clients that run together, tokens that are all there."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import shapes
from benchmarks.peer_cells import CELLS, Cell, Target, first_token, measure, prompt, summarise, warm_up
from benchmarks.raw_stream import Answer, read_answer, stream

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def event(text: str = "", **fields: Any) -> bytes:
    data = b"data: " + json.dumps({"choices": [{"text": text}], **fields}).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 5, "completion_tokens": 2}


def test_an_answer_is_read_from_the_pieces_in_which_it_came() -> None:
    whole = HEAD + event() + event("a") + event("b", usage=USAGE) + b"0\r\n\r\n"
    cut = whole.index(b'"a"')
    arrivals = [(1.0, whole[: len(HEAD) + 3]), (2.0, whole[len(HEAD) + 3 : cut]), (3.0, whole[cut:])]
    assert read_answer(0.5, arrivals) == Answer(0.5, 3.0, 3.0, prompt_tokens=5, completion_tokens=2, num_events=3)


def test_an_answer_that_is_only_ids_has_a_first_time() -> None:
    ids = {"choices": [{"text": "", "token_ids": [3]}], "usage": USAGE}
    arrivals = [(1.0, HEAD + b"data: " + json.dumps(ids).encode())]
    assert read_answer(0.0, arrivals).first == 1.0


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"HTTP/1.1 422 No\r\n\r\n{}", "HTTP/1.1 422 No {}"),
        (HEAD + event("a") + event(error={"message": "lost"}), "lost"),
        (HEAD + event("a"), "without the counts"),
        (b"", ""),
    ],
)
def test_an_answer_that_failed_says_why(sent: bytes, error: str) -> None:
    answer = read_answer(0.0, [(1.0, sent)])
    assert answer.error is not None
    assert error in answer.error


@asynccontextmanager
async def serving(
    reply: Callable[[dict[str, Any]], bytes],
) -> AsyncIterator[tuple[Target, list[dict[str, Any]], list[int]]]:
    """A server that answers every request like this, keeps its connections open, and counts who is there at once."""
    bodies: list[dict[str, Any]] = []
    present = [0]
    handlers: list[asyncio.Task[None] | None] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        assert length is not None
        bodies.append(json.loads(await reader.readexactly(int(length[1]))))
        present.append(present[-1] + 1)
        await asyncio.sleep(0.01)
        writer.write(reply(bodies[-1]))
        present.append(present[-1] - 1)
        await reader.read()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield Target(f"http://127.0.0.1:{port}", "m", {"extra": 1}, limit=5.0), bodies, present
        await asyncio.gather(*(handler for handler in handlers if handler is not None))


def complete(body: dict[str, Any]) -> bytes:
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    return HEAD + event("a") + event("b", usage=usage) + b"0\r\n\r\n"


async def test_clients_run_together_until_the_time_is_up() -> None:
    async with serving(complete) as (target, bodies, present):
        measured = await measure(target, CELLS["c4"], seconds=0.1)
    assert max(present) == 4
    assert measured["error"] is None
    assert measured["num_requests"] == len(bodies) >= 8
    assert len(bodies) % 4 == 0
    assert measured["tokens_per_second"] == pytest.approx(64 * len(bodies) / measured["seconds"])
    assert len({body["prompt"] for body in bodies}) == len(bodies)
    assert all((body["model"], body["max_tokens"], body["extra"]) == ("m", 64, 1) for body in bodies)


async def test_a_cell_with_a_number_of_requests_sends_just_these() -> None:
    async with serving(complete) as (target, bodies, _):
        measured = await measure(target, CELLS["shared"], seconds=0.0)
    assert measured["num_requests"] == len(bodies) == 16
    assert len({body["prompt"][:512] for body in bodies}) == 1


async def test_warming_up_asks_other_prompts_than_the_cells() -> None:
    async with serving(complete) as (target, bodies, _):
        await warm_up(target, [CELLS["c64"], CELLS["prefill"]])
        warm = {body["prompt"] for body in bodies}
        await measure(target, CELLS["prefill"], seconds=0.0)
    assert len(warm) == 17
    assert bodies[-1]["prompt"] not in warm


async def test_a_failing_server_ends_the_cell() -> None:
    async with serving(lambda _: b"HTTP/1.1 500 Oh\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n") as (
        target,
        bodies,
        _,
    ):
        measured = await measure(target, CELLS["c4"], seconds=5.0)
        with pytest.raises(RuntimeError, match="500"):
            await first_token(target, started=0.0)
    assert len(bodies) == 4 + 1
    assert measured["tokens_per_second"] is None
    assert measured["num_errors"] == 4


async def test_a_server_that_is_not_there_is_an_error() -> None:
    answer = await stream("http://127.0.0.1:9", {})
    assert answer.error is not None
    assert "ConnectionRefusedError" in answer.error


async def test_a_real_server_counts_what_was_asked(live_base_url: str) -> None:
    extra = {"ignore_eos": True, "stream_options": {"include_usage": True}}
    body = {"model": "pocket", "prompt": [1, 2, 3], "max_tokens": 5, "stream": True, "temperature": 0, **extra}
    answer = await stream(live_base_url, body)
    assert (answer.error, answer.prompt_tokens, answer.completion_tokens) == (None, 3, 5)
    assert answer.first is not None
    assert answer.start < answer.first <= answer.end


def test_a_missing_token_takes_the_figure_away() -> None:
    cell = Cell("x", "x", 2, 5, 2)
    good = Answer(1.0, 1.5, 3.0, 5, 2)
    assert summarise(cell, [good, Answer(2.0, 2.5, 5.0, 5, 2)], client_cpu_share=0.0)["tokens_per_second"] == 1.0
    short = summarise(cell, [good, Answer(2.0, 2.5, 5.0, 5, 1)], client_cpu_share=0.0)
    assert short["tokens_per_second"] is short["decode_tokens_per_second"] is None
    assert short["error"] == "1 output tokens instead of 2"
    unlike = summarise(cell, [Answer(1.0, 1.5, 3.0, 6, 2)], client_cpu_share=0.0)
    assert unlike["error"] == "6 prompt tokens instead of 5"


def test_the_rate_of_a_stream_begins_with_its_first_token() -> None:
    answers = [Answer(0.0, 2.0, 4.0, 5, 9), Answer(4.0, 6.0, 7.0, 5, 9), Answer(7.0, 7.5, 8.5, 5, 9)]
    measured = summarise(Cell("x", "x", 1, 5, 9), answers, client_cpu_share=0.0)
    assert measured["decode_tokens_per_second"] == 8.0
    single = summarise(Cell("x", "x", 1, 5, 1), [Answer(0.0, 1.0, 1.0, 5, 1)], client_cpu_share=0.0)
    assert single["decode_tokens_per_second"] is None


@pytest.mark.parametrize("vocab_size", [512, 49_152])
def test_prompts_are_as_long_as_the_cells_say(tmp_path: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer

    shapes.write_tokenizer(tmp_path, vocab_size)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for cell in CELLS.values():
        first, second = (tokenizer.encode(prompt(cell, number)).ids for number in (0, 1))
        assert len(first) == len(second) == cell.prompt_tokens
        assert first[: cell.shared_tokens] == second[: cell.shared_tokens]
        assert first[cell.shared_tokens :] != second[cell.shared_tokens :]
