"""Chunks of a stream as its events, each with an id, less those that the client has already."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from reprise.api import sse
from reprise.api.chunks import Placed
from reprise.api.event_ids import EventId, EventIdWriter


class EventWriter:
    """Takes all chunks of a response, whatever the client has: the later ones follow from the earlier."""

    def __init__(self, ids: EventIdWriter, sent: EventId | None) -> None:
        """sent: where the client stands; None at the beginning."""
        self._ids = ids
        self._sent = sent
        if sent is not None:
            # A choice that the client is ahead in stays there in the ids of the others' events.
            for index, position in enumerate(sent.positions):
                ids.move(index, position)

    def write(self, placed: Iterable[Placed[msgspec.Struct]]) -> bytes:
        """The events, one after the other; nothing where there is nothing new."""
        return b"".join([self._event(one) for one in placed])

    def _event(self, placed: Placed[msgspec.Struct]) -> bytes:
        chunk, index, position = placed
        if index is None or position is None:
            if self._sent is not None and self._sent.usage_sent:
                return b""
            self._ids.usage()
        elif self._sent is not None and position <= self._sent.positions[index]:
            return b""
        else:
            self._ids.move(index, position)
        return sse.encode(chunk, event_id=self._ids.id())
