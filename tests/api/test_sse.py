from __future__ import annotations

import ast
import json
import logging
from pathlib import Path

import msgspec
import pytest
from sse_starlette.sse import AppStatus

import reprise
from reprise.api import sse
from reprise.protocol.responses import (
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatDelta,
    Error,
    ErrorResponse,
    Readiness,
)
from support.loopback import events, events_with_ids

CHUNK = ChatCompletionChunk(
    id="c",
    created=1,
    model="m",
    system_fingerprint="f",
    choices=[ChatChunkChoice(0, ChatDelta(content="a\n\nb\r你🙂"))],
)


@pytest.mark.parametrize(
    ("message", "data"),
    [
        (
            CHUNK,
            (
                '{"id":"c","object":"chat.completion.chunk","created":1,"model":"m","system_fingerprint":"f",'
                '"choices":[{"index":0,"delta":{"content":"a\\n\\nb\\r你🙂"},"logprobs":null,"finish_reason":null}]}'
            ),
        ),
        (
            ErrorResponse(Error("M", "server_error", None, "c")),
            '{"error":{"message":"M","type":"server_error","param":null,"code":"c"}}',
        ),
        (Readiness("ready", "yes"), '{"status":"ready","reason":"yes"}'),
    ],
)
def test_encode_and_back(message: msgspec.Struct, data: str) -> None:
    encoded = sse.encode(message)
    assert encoded == f"data: {data}\n\n".encode()
    assert encoded.count(b"\n") == 2
    assert events(encoded.decode()) == [json.loads(data)]


def test_no_client_finds_a_line_end_within_the_data() -> None:
    """`str.splitlines`, which httpx's `iter_lines` is made with, knows further ones than JSON escapes."""
    text = "".join(character for character in map(chr, range(0x3000)) if len(f"a{character}b".splitlines()) > 1)
    assert {"\n", "\x85", "\u2028", "\u2029"} < {*text}
    encoded = sse.encode(Readiness("ready", f"ä{text}"), event_id=b"2.x.3").decode()
    assert len(encoded.splitlines()) == 3
    assert events_with_ids(encoded) == [({"status": "ready", "reason": f"ä{text}"}, "2.x.3")]


def test_an_id_comes_after_the_data() -> None:
    """Who reads line by line and has seen the id has seen the data."""
    encoded = sse.encode(Readiness("ready", "yes"), event_id=b"1.x.3")
    assert encoded == b'data: {"status":"ready","reason":"yes"}\nid: 1.x.3\n\n'
    assert events_with_ids(encoded.decode()) == [({"status": "ready", "reason": "yes"}, "1.x.3")]


def test_the_end() -> None:
    assert events(sse.DONE.decode()) == ["[DONE]"]


def test_the_librarys_own_drain_is_off() -> None:
    """It would cut every stream at the first SIGTERM."""
    assert not AppStatus.enable_automatic_graceful_drain


def test_the_library_never_logs_chunks() -> None:
    assert not logging.getLogger("sse_starlette.sse").isEnabledFor(logging.DEBUG)


def test_the_library_is_imported_in_one_place() -> None:
    root = Path(reprise.__file__).parent
    importers = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sse_starlette"))
        or (isinstance(node, ast.Import) and any(name.name.startswith("sse_starlette") for name in node.names))
    }
    assert importers == {"api/sse.py"}
