"""How much structure a body may have, found out before any of it is built.

Decoding JSON and validating it hold the interpreter lock, and streams of others stand still meanwhile. Text and
lists of numbers are cheap a byte; objects, arrays and members are not. Counting goes piece by piece, so a thread
that counts lets the event loop have its turns.
"""

from __future__ import annotations

import msgspec

from reprise.errors import InvalidRequestError

MAX_CONTAINERS = 2**15
"""Arrays and objects of a body: several times what the largest chat has."""
MAX_MEMBERS = 2**16
"""Members of all objects of a body together."""
_PIECE = 64 * 1024


def check_structure(body: bytes) -> None:
    """Raise InvalidRequestError for a body that has too many arrays, objects or members."""
    # Brackets inside strings are in these sums too: where even they are few, nothing more is to be found out.
    if body.count(b"[") + body.count(b"{") <= MAX_CONTAINERS and body.count(b":") <= MAX_MEMBERS:
        return
    num_containers, num_members = count_structure(body)
    if num_containers <= MAX_CONTAINERS and num_members <= MAX_MEMBERS:
        return
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return  # the parser tells what is wrong with it, and stops there
    if num_members > MAX_MEMBERS:
        message = f"The objects of the body have more than {MAX_MEMBERS} members together."
        raise InvalidRequestError(message, code="too_many_values")
    param = _largest_member(body)
    where = "The body" if param is None else f"Invalid '{param}': it"
    raise InvalidRequestError(
        f"{where} has more than {MAX_CONTAINERS} arrays and objects.", param=param, code="too_many_values"
    )


def count_structure(body: bytes) -> tuple[int, int]:
    """Arrays and objects, and members, of a JSON text; at most a piece beyond the limits. Strings do not count."""
    num_containers = num_members = start = 0
    in_string = False
    while start < len(body) and num_containers <= MAX_CONTAINERS and num_members <= MAX_MEMBERS:
        piece = body[start : start + _PIECE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = body[start : start + _PIECE + 1]
        start += len(piece)
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[in_string::2])
        in_string ^= (len(parts) - 1) % 2 == 1
        num_containers += outside.count(b"[") + outside.count(b"{")
        num_members += outside.count(b":")
    return num_containers, num_members


def _largest_member(body: bytes) -> str | None:
    """The name of the body's longest member."""
    try:
        members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        return None
    return max(members, key=lambda name: len(bytes(members[name])), default=None)
