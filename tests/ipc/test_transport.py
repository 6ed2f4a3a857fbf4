"""Frames and messages over a socket pair: any split, any garbage, and a peer that goes away."""

from __future__ import annotations

import itertools
import socket
import threading
import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reprise.ipc.messages import Abort, Add, EngineStats, FromEngine, SequenceOutput, StepOutput, ToEngine
from reprise.ipc.transport import (
    BlockingConnection,
    ConnectionClosed,
    FrameDecoder,
    MessageCodec,
    ProtocolError,
)
from reprise.types import FinishReason, SamplingParams, TokenLogprobs


def framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


@given(payloads=st.lists(st.binary(max_size=40), max_size=8), cuts=st.lists(st.integers(0, 400), max_size=12))
def test_frames_come_out_whole_for_every_split(payloads: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(framed, payloads))
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    decoder = FrameDecoder()
    frames = [f for a, b in itertools.pairwise(edges) for f in decoder.feed(stream[a:b])]
    assert frames == payloads


def test_a_length_above_the_cap_is_refused_before_the_bytes_come() -> None:
    with pytest.raises(ProtocolError, match="above the cap"):
        FrameDecoder(max_frame_bytes=100).feed((101).to_bytes(4, "big"))


def test_every_field_of_a_message_survives() -> None:
    sampling = SamplingParams(
        seed=-(2**63), max_tokens=5, logit_bias={3: -1.5}, bad_words=(b"\xff",), allowed_token_ids=(1,)
    )
    add = Add(7, 2, [1, 2], sampling, [9])
    assert MessageCodec[ToEngine](ToEngine).decode(MessageCodec[ToEngine](ToEngine).encode(add)[4:]) == add
    output = SequenceOutput(
        sequence_id=7,
        position=3,
        token_ids=[5],
        logprobs=[TokenLogprobs(5, -0.5, [(5, -0.5), (6, -1.0)])],
        prompt_logprobs=[None, TokenLogprobs(2, -3.0)],
        finish_reason=FinishReason.STOP,
    )
    step = StepOutput([output], EngineStats(num_steps=4))
    assert MessageCodec[FromEngine](FromEngine).decode(MessageCodec[FromEngine](FromEngine).encode(step)[4:]) == step


@given(st.binary(max_size=60))
def test_garbage_is_a_protocol_error_and_nothing_else(data: bytes) -> None:
    try:
        MessageCodec[ToEngine](ToEngine).decode(data)
    except ProtocolError:
        return
    assert msgspec.msgpack.decode(data)["type"] in {"start", "add", "abort"}


def test_a_connection_waits_at_most_its_timeout_and_sees_the_peer_go() -> None:
    ours, theirs = socket.socketpair()
    connection: BlockingConnection[ToEngine] = BlockingConnection(ours, ToEngine)
    started = time.monotonic()
    assert connection.receive(0.05) == []
    assert time.monotonic() - started < 1.0
    codec = MessageCodec[ToEngine](ToEngine)
    theirs.sendall(codec.encode(Abort([1])) + codec.encode(Abort([2])))
    assert connection.receive(1.0) == [Abort([1]), Abort([2])]
    theirs.close()
    with pytest.raises(ConnectionClosed):
        connection.receive(1.0)
    with pytest.raises(ConnectionClosed):
        connection.send(Abort([3]))
    connection.close()


def test_the_peers_end_is_seen_with_unread_messages_in_the_way() -> None:
    ours, theirs = socket.socketpair()
    connection: BlockingConnection[ToEngine] = BlockingConnection(ours, ToEngine)
    theirs.sendall(MessageCodec[ToEngine](ToEngine).encode(Abort([1])))
    assert not connection.peer_is_gone(0.05)
    theirs.close()
    assert connection.peer_is_gone(5.0)
    assert connection.receive(1.0) == [Abort([1])]
    connection.close()


def test_threads_may_send_at_once() -> None:
    """Messages larger than the socket's buffer, so that every send takes several writes."""
    ours, theirs = socket.socketpair()
    connection: BlockingConnection[ToEngine] = BlockingConnection(ours, ToEngine)
    other: BlockingConnection[ToEngine] = BlockingConnection(theirs, ToEngine)
    messages = [Abort([n] * 100_000) for n in range(4)]
    threads = [threading.Thread(target=connection.send, args=(message,)) for message in messages]
    for thread in threads:
        thread.start()
    received: list[ToEngine] = []
    while len(received) < len(messages):
        received += other.receive(10.0)
    for thread in threads:
        thread.join()
    assert sorted(m.sequence_ids[0] for m in received if isinstance(m, Abort)) == [0, 1, 2, 3]
    connection.close()
    other.close()


@settings(deadline=None)
@given(st.binary(max_size=200), st.lists(st.integers(1, 50), max_size=8))
def test_no_bytes_make_a_decoder_do_more_than_refuse(data: bytes, sizes: list[int]) -> None:
    """What a broken engine could write: frames or a ProtocolError, and nothing kept beyond what came."""
    decoder, codec = FrameDecoder(max_frame_bytes=64), MessageCodec[FromEngine](FromEngine)
    start = 0
    try:
        for size in [*sizes, len(data)]:
            for frame in decoder.feed(data[start : start + size]):
                codec.decode(frame)
            start += size
    except ProtocolError:
        return
    assert len(decoder._buffer) <= len(data)


def test_a_large_message_goes_through_a_slow_reader() -> None:
    ours, theirs = socket.socketpair()
    connection: BlockingConnection[ToEngine] = BlockingConnection(ours, ToEngine)
    message = Add(1, 0, list(range(200_000)), SamplingParams(seed=0, max_tokens=1))
    codec = MessageCodec[ToEngine](ToEngine)
    writer = threading.Thread(target=lambda: theirs.sendall(codec.encode(message)))
    writer.start()
    assert connection.receive(10.0) == [message]
    writer.join()
    theirs.close()
    connection.close()
