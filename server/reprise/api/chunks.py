"""What chunks of chat and of completions have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from msgspec import UNSET, UnsetType

from reprise.api.event_ids import Phase, Position
from reprise.api.head import ResponseHead, UsageCount
from reprise.protocol.responses import Finished, RepriseExtension, Usage
from reprise.types import ChoiceDelta


class AnyChoice(Protocol):
    """What is read of a chunk's choice."""

    @property
    def finish_reason(self) -> Finished | None: ...


Choice = TypeVar("Choice", bound=AnyChoice)
Chunk = TypeVar("Chunk")
Chunk_co = TypeVar("Chunk_co", covariant=True)


class Placed(NamedTuple, Generic[Chunk_co]):
    """A chunk, and where the choice of that index stands after it. The usage has neither."""

    chunk: Chunk_co
    choice_index: int | None
    position: Position | None


class ResponseChunks(ABC, Generic[Choice, Chunk]):
    """Deltas of a response to its chunks, one choice each: pushed one by one, then `end`.

    However the deltas were merged, the chunks up to a position have the same texts, tokens and log-probabilities.
    """

    def __init__(
        self,
        head: ResponseHead,
        make_chunk: Callable[..., Chunk],
        *,
        include_usage: bool,
        prediction_token_ids: Sequence[int] = (),
    ) -> None:
        """make_chunk: takes a chunk's members by their names."""
        self._head = head
        self._make_chunk = make_chunk
        self._usage_on_chunks = None if include_usage else UNSET
        self._count = UsageCount(head, prediction_token_ids if include_usage else ())
        self._num_tokens: dict[int, int] = {}
        self._extension: RepriseExtension | UnsetType = head.extension

    def omit_extension(self) -> None:
        """The client has the extension already: it was in the first chunk, of whatever choice that was."""
        self._extension = UNSET

    def push(self, delta: ChoiceDelta) -> list[Placed[Chunk]]:
        self._count.add(delta)
        index, placed = delta.index, []
        num_tokens = self._num_tokens.get(index)
        if num_tokens is None:
            num_tokens = 0
            opening = self._opening(delta)
            if opening is not None:
                placed.append(Placed(self._chunk([opening]), index, Position(0, Phase.BEGUN)))
        self._num_tokens[index] = num_tokens = num_tokens + len(delta.token_ids)
        text_phase = Phase.BEGUN if delta.finish_reason is None else Phase.LAST_TEXT
        for choice in self._generated(delta):
            phase = text_phase if choice.finish_reason is None else Phase.FINISHED
            placed.append(Placed(self._chunk([choice]), index, Position(num_tokens, phase)))
        return placed

    def end(self) -> list[Placed[Chunk]]:
        """The chunk with the sums, where they were asked for."""
        if self._usage_on_chunks is UNSET:
            return []
        return [Placed(self._chunk([], self._count.usage()), None, None)]

    @abstractmethod
    def _opening(self, delta: ChoiceDelta) -> Choice | None:
        """What comes before anything of a choice that is generated. delta: the choice's first."""

    @abstractmethod
    def _generated(self, delta: ChoiceDelta) -> Sequence[Choice]:
        """What is new of a choice; its finish reason in the last one."""

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
