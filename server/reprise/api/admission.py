"""How many sequences may be in the server at once, running or waiting."""

from __future__ import annotations

from reprise.errors import InvalidRequestError, OverloadedError


class Ticket:
    """A reservation. Released once; a second release does nothing."""

    def __init__(self, admission: Admission, num_sequences: int) -> None:
        self._admission = admission
        self._num_sequences = num_sequences
        self._num_ended = 0

    @property
    def released(self) -> bool:
        return self._num_sequences == 0

    def end(self) -> None:
        """Its sequences neither run nor wait any more; what they gave is still read. Idempotent."""
        self._admission.num_ended += self._num_sequences - self._num_ended
        self._num_ended = self._num_sequences

    def release(self) -> None:
        self._admission.num_reserved -= self._num_sequences
        self._admission.num_ended -= self._num_ended
        self._num_sequences = self._num_ended = 0


class Admission:
    """Counts reserved sequences.

    A ticket is taken before any rendering or tokenising is done for a request. `limit` sequences may run or wait; as
    many again may have ended and be read to their end by slow clients, and only what is beyond that takes places of
    others. So there are never more than twice `limit`, which bounds what is held for those that have a ticket: a whole
    answer too, until what is left of it fits its connection.
    """

    def __init__(self, *, max_num_seqs: int, max_waiting_seqs: int) -> None:
        self.limit = max_num_seqs + max_waiting_seqs
        self.num_reserved = 0
        self.num_ended = 0
        """Of these."""
        self.num_rejections = 0

    @property
    def _num_free(self) -> int:
        return self.limit - (self.num_reserved - min(self.num_ended, self.limit))

    def reserve(self, num_sequences: int) -> Ticket:
        """Raises OverloadedError where there is no room now, InvalidRequestError where there never is."""
        if num_sequences > self.limit:
            raise InvalidRequestError(
                f"{num_sequences} choices are asked for (prompts times n), and this server takes at most"
                f" {self.limit} at once.",
                param="n",
            )
        if num_sequences > self._num_free:
            self.reject()
        self.num_reserved += num_sequences
        return Ticket(self, num_sequences)

    def check_room(self) -> None:
        """Raise OverloadedError where not even one sequence has room, before a request's body is read."""
        if self._num_free < 1:
            self.reject()

    def reject(self) -> None:
        self.num_rejections += 1
        raise OverloadedError(
            f"The server is at its limit of {self.limit} running and waiting sequences. Try again later."
        )
