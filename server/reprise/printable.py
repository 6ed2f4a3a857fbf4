"""Text of others for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with its control characters, and others that are not to be seen, spelt as escapes; lines stay lines."""
    return "".join(one if one == "\n" or one.isprintable() else ascii(one)[1:-1] for one in text)
