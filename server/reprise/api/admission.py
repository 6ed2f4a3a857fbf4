"""How many sequences may be in the server at once, running or waiting."""

from __future__ import annotations

from reprise.errors import InvalidRequestError, OverloadedError


class Ticket:
    """A reservation. Released once; a second release does nothing."""

    def __init__(self, admission: Admission, num_sequences: int) -> None:
        self._admission = admission
        self._num_sequences = num_sequences

    @property
    def released(self) -> bool:
        return self._num_sequences == 0

    def release(self) -> None:
        self._admission.num_reserved -= self._num_sequences
        self._num_sequences = 0


class Admission:
    """Counts reserved sequences.

    A ticket is taken before any rendering or tokenising is done for a request.
    """

    def __init__(self, *, max_num_seqs: int, max_waiting_seqs: int) -> None:
        self.limit = max_num_seqs + max_waiting_seqs
        self.num_reserved = 0
        self.num_rejections = 0

    def reserve(self, num_sequences: int) -> Ticket:
        """Raises OverloadedError where there is no room now, InvalidRequestError where there never is."""
        if num_sequences > self.limit:
            raise InvalidRequestError(
                f"{num_sequences} choices are asked for (prompts times n), and this server takes at most"
                f" {self.limit} at once.",
                param="n",
            )
        if self.num_reserved + num_sequences > self.limit:
            self.reject()
        self.num_reserved += num_sequences
        return Ticket(self, num_sequences)

    def check_room(self) -> None:
        """Raise OverloadedError where not even one sequence has room, before a request's body is read."""
        if self.num_reserved >= self.limit:
            self.reject()

    def reject(self) -> None:
        self.num_rejections += 1
        raise OverloadedError(
            f"The server is at its limit of {self.limit} running and waiting sequences. Try again later."
        )
