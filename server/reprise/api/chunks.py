"""What chunks of chat and of completions have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from msgspec import UNSET, UnsetType

from reprise.api.head import ResponseHead, UsageCount
from reprise.protocol.responses import RepriseExtension, Usage
from reprise.types import ChoiceDelta

Choice = TypeVar("Choice")
Chunk = TypeVar("Chunk")


class ResponseChunks(ABC, Generic[Choice, Chunk]):
    """Deltas of a response to its chunks, one choice each: pushed one by one, then `end`."""

    def __init__(self, head: ResponseHead, make_chunk: Callable[..., Chunk], *, include_usage: bool) -> None:
        """make_chunk: takes a chunk's members by their names."""
        self._head = head
        self._make_chunk = make_chunk
        self._usage_on_chunks = None if include_usage else UNSET
        self._count = UsageCount(head)
        self._begun: set[int] = set()
        self._extension: RepriseExtension | UnsetType = head.extension

    def push(self, delta: ChoiceDelta) -> list[Chunk]:
        self._count.add(delta)
        first = delta.index not in self._begun
        self._begun.add(delta.index)
        return [self._chunk([choice]) for choice in self._choices(delta, first=first)]

    def end(self) -> list[Chunk]:
        """The chunk with the sums, where they were asked for."""
        if self._usage_on_chunks is UNSET:
            return []
        return [self._chunk([], self._count.usage())]

    @abstractmethod
    def _choices(self, delta: ChoiceDelta, *, first: bool) -> Sequence[Choice]:
        """What is new of a choice. first: whether this is its first delta."""

    def _chunk(self, choices: list[Choice], usage: Usage | None = None) -> Chunk:
        extension, self._extension = self._extension, UNSET
        return self._make_chunk(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.system_fingerprint,
            choices=choices,
            usage=usage or self._usage_on_chunks,
            reprise=extension,
        )
