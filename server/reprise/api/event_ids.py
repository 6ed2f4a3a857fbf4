"""The `id:` of a stream's events: where a client stands in its response, and all that is needed to go on from there.

A chunk has no number that would be the same next time: chunks grow while a client is slow, and choices take turns as
they come. So an id is a position. Its text is opaque to clients:

    2.<48 bytes in base64url>.<a position for each choice, joined by "-">[u].<crc32 of all before, in hexadecimal>

The bytes are the response's own number (16), `created` (4), the seed (8, signed), the system fingerprint (8), the
first 8 of the request's digest and the first 4 of the prompts', big-endian. A position is empty where nothing of the
choice was sent, else the number of tokens behind what was sent, with "l" where that was all of its text and "f" where
its finish reason was sent too. "u" says that the usage was sent. Ids of one response differ after the second dot only.
"""

from __future__ import annotations

import binascii
import re
import struct
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import msgspec

VERSION = "2"
MAX_LENGTH = 32 * 1024
"""Characters of an id at most: half of what a request's head may have."""
_FACTS = struct.Struct(">16sIq8s8s4s")
_FORM = re.compile(r"2\.(?P<facts>[A-Za-z0-9_-]{64})\.(?P<positions>[0-9lf-]*)(?P<usage>u?)\.(?P<checksum>[0-9a-f]{8})")
_POSITION = re.compile(r"(?P<num_tokens>0|[1-9][0-9]{0,9})(?P<phase>[lf]?)")


class Phase(IntEnum):
    """How far the events of a choice have come, besides its tokens."""

    UNSEEN = 0
    BEGUN = 1
    LAST_TEXT = 2
    FINISHED = 3


class Position(NamedTuple):
    """Where a choice stands after an event. Later ones are larger."""

    num_tokens: int
    phase: Phase


START = Position(0, Phase.UNSEEN)
_SUFFIXES = {Phase.BEGUN: "", Phase.LAST_TEXT: "l", Phase.FINISHED: "f"}
_PHASES = {suffix: phase for phase, suffix in _SUFFIXES.items()}


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What the events of one response follow from, besides the request itself."""

    number: bytes
    """16 bytes of the response's id."""
    created: int
    seed: int
    fingerprint: bytes
    """8 bytes of the system fingerprint."""
    digest: bytes
    """The first 8 bytes of the request's digest."""
    prompts: bytes
    """The first 4 bytes of a digest of the prompts' tokens."""


class EventId(msgspec.Struct, frozen=True):
    """What an id says."""

    origin: Origin
    positions: tuple[Position, ...]
    usage_sent: bool


class InvalidEventIdError(ValueError):
    """A text that is no id of this server's, or not all of one."""


class EventIdWriter:
    """Writes the ids of one stream while its positions move on."""

    def __init__(self, origin: Origin, num_choices: int) -> None:
        facts = _FACTS.pack(*msgspec.structs.astuple(origin))
        self._prefix = f"{VERSION}.{urlsafe_b64encode(facts).decode()}.".encode()
        self._prefix_checksum = binascii.crc32(self._prefix)
        self._positions = [""] * num_choices
        self._usage = ""

    def move(self, index: int, position: Position) -> None:
        self._positions[index] = "" if position == START else f"{position.num_tokens}{_SUFFIXES[position.phase]}"

    def usage(self) -> None:
        self._usage = "u"

    def id(self) -> bytes:
        """Of an event that ends here."""
        changing = f"{'-'.join(self._positions)}{self._usage}.".encode()
        return b"%b%b%08x" % (self._prefix, changing, binascii.crc32(changing, self._prefix_checksum))


def parse(text: str) -> EventId:
    """What an id says. Raises InvalidEventIdError."""
    if len(text) > MAX_LENGTH:
        raise InvalidEventIdError(f"it has {len(text)} characters, and ids have at most {MAX_LENGTH}")
    match = _FORM.fullmatch(text)
    if match is None:
        raise InvalidEventIdError("it is not the id of an event, or not all of it")
    signed, _, checksum = text.rpartition(".")
    if binascii.crc32(f"{signed}.".encode()) != int(checksum, 16):
        raise InvalidEventIdError("it is damaged: its checksum is not right")
    facts = _FACTS.unpack(b64decode(match["facts"], altchars=b"-_"))
    origin = Origin(**dict(zip(Origin.__struct_fields__, facts, strict=True)))
    positions = tuple(_parse_position(piece) for piece in match["positions"].split("-"))
    usage_sent = bool(match["usage"])
    if usage_sent and any(position.phase is not Phase.FINISHED for position in positions):
        raise InvalidEventIdError("it has the usage before the end of a choice")
    return EventId(origin, positions, usage_sent)


def cuts(positions: Sequence[Position]) -> dict[int, int]:
    """Of choices that have begun, the number of tokens that were sent."""
    return {index: position.num_tokens for index, position in enumerate(positions) if position.num_tokens}


def _parse_position(piece: str) -> Position:
    if not piece:
        return START
    match = _POSITION.fullmatch(piece)
    if match is None:
        raise InvalidEventIdError("one of its positions is none")
    return Position(int(match["num_tokens"]), _PHASES[match["phase"]])
