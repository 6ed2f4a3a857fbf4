"""How a tokenizer's pieces spell bytes, read from the description of its decoder.

A decoder of the `tokenizers` library is a chain of steps over a list of pieces. Where every step but one at
the very start or end of the text works piece by piece, each piece has bytes of its own, and a text is the
concatenation of the bytes of its tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Step = Callable[[str | bytes], str | bytes]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"


@dataclass(frozen=True)
class Speller:
    """The bytes of a piece. `byte_level`: pieces are written in GPT-2's alphabet of 256 printable characters."""

    steps: tuple[Step, ...]
    byte_level: bool = False

    def spell(self, piece: str) -> bytes:
        value: str | bytes = piece
        for step in self.steps:
            value = step(value)
        return value if isinstance(value, bytes) else value.encode(errors="replace")


class _ByteLevelTable(dict[int, int]):
    """Code points of GPT-2's byte alphabet → bytes; anything else → a code point that Latin-1 does not have."""

    def __missing__(self, key: int) -> int:
        return 0xFFFF


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print stand for themselves, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_LEVEL_TABLE = _ByteLevelTable({ord(character): byte for character, byte in byte_level_alphabet().items()})


def speller_for(decoder: Mapping[str, Any] | None) -> Speller | None:
    """The speller of a decoder's JSON description; None where its pieces have no bytes of their own.

    Without any decoder the pieces are joined with spaces: each piece spells a space and itself.
    """
    if decoder is None:
        return Speller((_per_text(lambda text: " " + text),))
    steps: list[Step] = []
    fused = False
    chain = _flatten(decoder)
    for part in chain:
        if part["type"] == "Fuse":
            fused = True
            continue
        if fused and _acts_on_edges_only(part):
            continue
        step = None if fused and not _is_character_replacement(part) else _step(part)
        if step is None:
            return None
        steps.append(step)
    return Speller(tuple(steps), byte_level=any(part["type"] == "ByteLevel" for part in chain))


def candidate_spellers() -> list[Speller]:
    """What the pieces of a tokenizer without a described decoder may be; a self-check has to choose."""
    metaspace = {"type": "Metaspace", "replacement": _METASPACE}
    described: list[dict[str, Any]] = [
        {"type": "ByteLevel"},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "Fuse"},
    ]
    return [speller for decoder in described if (speller := speller_for(decoder)) is not None]


def _flatten(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [part for inner in decoder["decoders"] for part in _flatten(inner)]


def _acts_on_edges_only(part: Mapping[str, Any]) -> bool:
    """True for a step that, over the fused text, only takes one leading space."""
    return bool(part["type"] == "Strip" and part["content"] == " " and part["start"] <= 1 and part["stop"] == 0)


def _is_character_replacement(part: Mapping[str, Any]) -> bool:
    return part["type"] == "Replace" and len(str(part["pattern"].get("String", ""))) == 1


def _step(part: Mapping[str, Any]) -> Step | None:
    """One step on one piece; bytes that an earlier step made stay as they are."""
    match part:
        case {"type": "ByteLevel"}:
            return _byte_level
        case {"type": "ByteFallback"}:
            return _byte_fallback
        case {"type": "Metaspace", "replacement": str(old)}:
            return _replacement(old, " ")
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return _replacement(old, new)
        case {"type": "Strip", "content": str(character), "start": int(start), "stop": int(stop)}:
            return _per_text(lambda text: _strip(text, character, start, stop))
        case {"type": "BPEDecoder", "suffix": str(suffix)}:
            return _replacement(suffix, " ")
        case {"type": "WordPiece", "prefix": str(prefix)}:
            return _per_text(lambda text: text.removeprefix(prefix) if text.startswith(prefix) else " " + text)
        case _:
            return None


def _per_text(change: Callable[[str], str]) -> Step:
    return lambda value: value if isinstance(value, bytes) else change(value)


def _replacement(old: str, new: str) -> Step:
    return _per_text(lambda text: text.replace(old, new))


def _byte_level(value: str | bytes) -> str | bytes:
    if isinstance(value, bytes):
        return value
    try:
        return value.translate(_BYTE_LEVEL_TABLE).encode("latin-1")
    except UnicodeEncodeError:
        return value.encode(errors="replace")


def _byte_fallback(value: str | bytes) -> str | bytes:
    if isinstance(value, str) and (found := _BYTE_PIECE.fullmatch(value)):
        return bytes([int(found[1], 16)])
    return value


def _strip(text: str, character: str, start: int, stop: int) -> str:
    first = 0
    while first < min(start, len(text)) and text[first] == character:
        first += 1
    last = len(text)
    while last > first and len(text) - last < stop and text[last - 1] == character:
        last -= 1
    return text[first:last]
