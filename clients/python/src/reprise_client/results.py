"""What a server answered. `raw` is the JSON object itself, for every field that has no attribute here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose computation was reused."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers to a request."""

    index: int
    text: str
    finish_reason: str
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer to a chat or completion request."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    request_id: str | None
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer."""

    index: int
    """Of the choice that it belongs to."""
    text: str
    finish_reason: str | None
    """Set on a choice's last chunk."""
    usage: Usage | None
    """Set on the stream's last chunk, which belongs to no choice and has no text."""
    raw: Mapping[str, Any] = field(repr=False)
