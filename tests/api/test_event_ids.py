from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprise.api.event_ids import (
    MAX_LENGTH,
    START,
    EventIdWriter,
    InvalidEventIdError,
    Origin,
    Phase,
    Position,
    cuts,
    parse,
)
from reprise.types import SEED_MAX, SEED_MIN

ORIGIN = Origin(
    number=bytes(range(16)),
    created=1_700_000_000,
    seed=-7,
    fingerprint=b"finger!!",
    digest=b"digest!!",
    prompts=b"asks",
)
POSITIONS = [START, Position(0, Phase.BEGUN), Position(1, Phase.BEGUN), Position(2**31, Phase.LAST_TEXT)]


def write(origin: Origin, positions: list[Position], *, usage: bool = False) -> str:
    writer = EventIdWriter(origin, len(positions))
    for index, position in enumerate(positions):
        if position != START:
            writer.move(index, position)
    if usage:
        writer.usage()
    return writer.id().decode("ascii")


origins = st.builds(
    Origin,
    number=st.binary(min_size=16, max_size=16),
    created=st.integers(0, 2**32 - 1),
    seed=st.integers(SEED_MIN, SEED_MAX),
    fingerprint=st.binary(min_size=8, max_size=8),
    digest=st.binary(min_size=8, max_size=8),
    prompts=st.binary(min_size=4, max_size=4),
)
begun = st.builds(Position, st.integers(0, 2**31), st.sampled_from([Phase.BEGUN, Phase.LAST_TEXT, Phase.FINISHED]))


@given(origins, st.lists(st.just(START) | begun, min_size=1, max_size=9))
def test_an_id_says_what_was_written(origin: Origin, positions: list[Position]) -> None:
    found = parse(write(origin, positions))
    assert (found.origin, found.positions, found.usage_sent) == (origin, tuple(positions), False)


def test_an_id_with_the_usage() -> None:
    done = [Position(3, Phase.FINISHED)] * 2
    assert parse(write(ORIGIN, done, usage=True)).usage_sent
    with pytest.raises(InvalidEventIdError, match="usage"):
        parse(write(ORIGIN, [done[0], Position(3, Phase.LAST_TEXT)], usage=True))


def test_an_id_is_a_header_value_and_a_line() -> None:
    allowed = set(string.ascii_letters + string.digits + "._-")
    assert set(write(ORIGIN, POSITIONS, usage=False)) <= allowed
    assert len(write(ORIGIN, [Position(1000, Phase.BEGUN)])) == 80


def test_later_positions_are_larger() -> None:
    ordered = [
        START,
        Position(0, Phase.BEGUN),
        Position(1, Phase.BEGUN),
        Position(2, Phase.BEGUN),
        Position(2, Phase.LAST_TEXT),
        Position(2, Phase.FINISHED),
    ]
    assert sorted(ordered) == ordered


def test_no_part_of_an_id_is_taken_for_one() -> None:
    whole = write(ORIGIN, POSITIONS)
    for end in range(len(whole)):
        with pytest.raises(InvalidEventIdError):
            parse(whole[:end])


def test_no_altered_id_is_taken_for_one() -> None:
    whole = write(ORIGIN, POSITIONS)
    for place in range(len(whole)):
        for other in "0a9Z-.l_":
            if other != whole[place]:
                with pytest.raises(InvalidEventIdError):
                    parse(whole[:place] + other + whole[place + 1 :])


@pytest.mark.parametrize("text", ["", "7", "2...", "x" * (MAX_LENGTH + 1), "2." + "A" * 64 + ".0.zzzzzzzz", "2.\n"])
def test_what_is_no_id(text: str) -> None:
    with pytest.raises(InvalidEventIdError):
        parse(text)


def test_only_what_has_tokens_is_cut() -> None:
    assert cuts(POSITIONS) == {2: 1, 3: 2**31}
