"""What the supervisor of an engine process decides: whether it hangs, whose fault a death is, when to give it up.

Pure: events in, decisions out, time is an argument. `async_engine` acts on the decisions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from reprise.ipc.messages import IDLE_SECONDS, SequenceOutput

LOADING_PATIENCE = 6.0
"""How many times later a heartbeat may be while loading, where much runs that keeps the interpreter to itself."""
NUM_SUSPICIOUS_DEATHS = 2
"""Deaths without getting ahead in between, after which a request is tried alone."""
NUM_TOKENS_AHEAD = 2
"""New tokens that clear a choice: the first comes of a prefill, the second of a decoding step."""
MAX_DEATHS = 4
MAX_DEATHS_IN_A_ROW = 16
DEATH_WINDOW_SECONDS = 60.0
RESTART_DELAYS = (0.0, 1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class HangLimits:
    """Seconds after which an engine that shows no life, finishes no step or does not become ready counts as hung."""

    heartbeat_timeout: float = 10.0
    step_timeout: float = 300.0
    load_timeout: float = 1800.0
    start_timeout: float = 600.0
    """Of the process alone. It may have to wait for the fork server's imports, from a slow disk."""


class Watchdog:
    """Whether one life of the engine hangs.

    It adds up the time between its looks, of each at most twice `interval`: where this process was itself stopped,
    what it has missed does not count.
    """

    def __init__(self, limits: HangLimits, now: float) -> None:
        self._limits = limits
        self._last_look = now
        self._silent = 0.0
        self._stalled = 0.0
        self._loading = 0.0
        self.interval = min(0.5, limits.heartbeat_timeout / 4)
        """Seconds from look to look."""

    def heard(self) -> None:
        """Any message came."""
        self._silent = 0.0

    def progressed(self) -> None:
        """A step was finished."""
        self._stalled = 0.0

    def look(self, now: float, *, loading: bool) -> str | None:
        """Why the engine counts as hung; None where it does not.

        Whether anybody waits for it says nothing: they may have given it up. One that has nothing to do says so.
        """
        elapsed = min(now - self._last_look, 2 * self.interval)
        self._last_look = now
        self._silent += elapsed
        self._loading = self._loading + elapsed if loading else 0.0
        self._stalled = self._stalled + elapsed if not loading else 0.0
        patience = self._limits.heartbeat_timeout * (LOADING_PATIENCE if loading else 1.0)
        if self._silent > patience:
            return f"it has shown no sign of life for {self._silent:.1f} seconds"
        if self._loading > self._limits.load_timeout:
            return f"it has been loading for {self._loading:.0f} seconds"
        if self._stalled > self._limits.step_timeout + IDLE_SECONDS:
            return f"it has finished no step for {self._stalled:.1f} seconds"
        return None


@dataclass(slots=True, eq=False)
class _Choice:
    choice_id: int
    request: _Request
    num_deaths: int = 0
    num_tokens_ahead: int = 0
    num_unconfirmed: int = 0
    """How many times it was taken out of the engine, which has not said yet that it is done with it."""


@dataclass(slots=True, eq=False)
class _Request:
    choices: dict[int, _Choice] = field(default_factory=dict)
    deaths: list[int] = field(default_factory=list)
    num_deaths_alone: int = 0

    @property
    def is_suspect(self) -> bool:
        return any(choice.num_deaths >= NUM_SUSPICIOUS_DEATHS for choice in self.choices.values())


@dataclass(frozen=True, slots=True)
class Moves:
    """Choices to take out of the engine, then choices to add to it, in this order."""

    withdraw: list[int] = field(default_factory=list)
    add: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Conviction:
    """The choices of a request that ends the engine process, and the deaths at which it was there."""

    choice_ids: list[int]
    deaths: list[int]
    """By number: each death of the engine has the next one, from 1."""

    @property
    def num_deaths(self) -> int:
        return len(self.deaths)


class Suspects:
    """Which requests may be in the engine, and which one is what it dies of.

    A choice that was in the engine at two deaths, and got ahead by less than NUM_TOKENS_AHEAD tokens in between,
    makes its request a suspect. While there are suspects the oldest of them is in the engine alone: it gets ahead
    and is cleared, or the engine dies again and it is convicted. A request that was alone at two deaths need not be
    tried. A death by a SIGKILL from elsewhere may be anybody's doing, so it takes one more of them to convict.

    Who is taken out is there until the engine has said so: it may be computing just that, and its client may have
    left because of it.
    """

    def __init__(self) -> None:
        self._choices: dict[int, _Choice] = {}
        self._requests: dict[_Request, None] = {}
        self._in_engine: dict[int, _Choice] = {}
        self._leaving: dict[int, _Choice] = {}
        self._ready = False
        self._num_deaths = 0

    @property
    def on_trial(self) -> bool:
        """Whether a request is being tried, and the others wait."""
        return any(request.is_suspect for request in self._requests)

    def add(self, choice_ids: Iterable[int]) -> None:
        """A new request, of these choices."""
        request = _Request()
        self._requests[request] = None
        for choice_id in choice_ids:
            self._choices[choice_id] = request.choices[choice_id] = _Choice(choice_id, request)

    def remove(self, choice_id: int) -> None:
        """A choice ended, however it did. No effect where it had before."""
        choice = self._choices.pop(choice_id, None)
        if choice is None:
            return
        self._take_out(choice_id)
        del choice.request.choices[choice_id]
        if not choice.request.choices:
            del self._requests[choice.request]

    def _take_out(self, choice_id: int) -> None:
        choice = self._in_engine.pop(choice_id, None)
        if choice is not None:
            choice.num_unconfirmed += 1
            self._leaving[choice_id] = choice

    def left(self, choice_id: int) -> None:
        """The engine is done with a choice that was removed or withdrawn: once for each time."""
        choice = self._leaving[choice_id]
        choice.num_unconfirmed -= 1
        if not choice.num_unconfirmed:
            del self._leaving[choice_id]

    def delivered(self, choice_id: int, num_tokens: int) -> bool:
        """New tokens came. True where that clears a request: others may move now."""
        choice = self._choices[choice_id]
        choice.num_tokens_ahead += num_tokens
        if not choice.num_deaths or choice.num_tokens_ahead < NUM_TOKENS_AHEAD:
            return False
        request = choice.request
        was_suspect = request.is_suspect
        choice.num_deaths = 0
        if not any(other.num_deaths for other in request.choices.values()):
            request.deaths.clear()
            request.num_deaths_alone = 0
        return was_suspect and not request.is_suspect

    def ready(self) -> None:
        """An engine waits for work."""
        self._ready = True

    def moves(self) -> Moves:
        """What has to change in the engine so that it holds whom it should; it counts as done."""
        if not self._ready:
            return Moves()
        suspect = next((request for request in self._requests if request.is_suspect), None)
        wanted = self._choices if suspect is None else suspect.choices
        moves = Moves(
            [choice_id for choice_id in self._in_engine if choice_id not in wanted],
            [choice_id for choice_id in wanted if choice_id not in self._in_engine],
        )
        for choice_id in moves.withdraw:
            self._take_out(choice_id)
        self._in_engine.update((choice_id, self._choices[choice_id]) for choice_id in moves.add)
        return moves

    def died(self, *, killed: bool) -> Conviction | None:
        """The engine's process ended. killed: by a SIGKILL that was not the supervisor's."""
        choices = self._leaving | self._in_engine
        present = dict.fromkeys(choice.request for choice in choices.values())
        convicted = None
        self._num_deaths += 1
        for request in present:
            was_suspect = request.is_suspect
            request.deaths.append(self._num_deaths)
            request.num_deaths_alone = request.num_deaths_alone + 1 if len(present) == 1 else 0
            if request.choices and request.num_deaths_alone >= (1 if was_suspect else 2) + killed:
                convicted = Conviction(list(request.choices), list(request.deaths))
        for choice in choices.values():
            choice.num_deaths += 1
            choice.num_unconfirmed = 0
        for choice in self._choices.values():
            choice.num_tokens_ahead = 0
        self._in_engine.clear()
        self._leaving.clear()
        self._ready = False
        return convicted


@dataclass(frozen=True, slots=True)
class Restart:
    """Start again after `delay` seconds, or not at all, and why not."""

    delay: float = 0.0
    given_up: str | None = None


class RestartPolicy:
    """How often an engine that gets nothing done is started again.

    A life counts that delivered no token: MAX_DEATHS of them one after the other end it, unless they were ready for
    DEATH_WINDOW_SECONDS in all, as an idle engine that somebody kills now and then. Deaths that a conviction explains
    do not count; but not more than MAX_DEATHS_IN_A_ROW times.
    """

    def __init__(self) -> None:
        self._ready_at: float | None = None
        self._delivered = False
        self._num_deaths = 0
        self._num_in_a_row = 0
        self._seconds_ready: dict[int, float] = {}
        """By the number of the death, of the last lives that count."""
        self._num_unready = 0

    def began(self) -> None:
        """A new life."""
        self._ready_at = None
        self._delivered = False

    def ready(self, now: float) -> None:
        self._ready_at = now

    def delivered(self) -> None:
        """This life has given a token."""
        self._delivered = True

    def died(self, now: float, *, explained: Collection[int] = ()) -> Restart:
        """explained: the deaths that a request was just convicted of, as in `Conviction`."""
        self._num_deaths += 1
        seconds_ready = 0.0 if self._ready_at is None else now - self._ready_at
        if self._delivered or seconds_ready >= DEATH_WINDOW_SECONDS:
            self._num_in_a_row = self._num_unready = 0
            self._seconds_ready.clear()
            return Restart()
        self._num_in_a_row += 1
        self._seconds_ready[self._num_deaths] = seconds_ready
        for death in explained:
            self._seconds_ready.pop(death, None)
        if len(self._seconds_ready) > MAX_DEATHS:
            del self._seconds_ready[min(self._seconds_ready)]
        self._num_unready = self._num_unready + 1 if self._ready_at is None else 0
        if self._num_unready >= MAX_DEATHS:
            return Restart(given_up=f"the engine process died {self._num_unready} times while loading")
        count = len(self._seconds_ready)
        if count >= MAX_DEATHS and sum(self._seconds_ready.values()) < DEATH_WINDOW_SECONDS:
            return Restart(given_up=f"the engine process died {count} times one after the other, without a token")
        if self._num_in_a_row >= MAX_DEATHS_IN_A_ROW:
            return Restart(given_up=f"the engine process died {self._num_in_a_row} times without a token")
        return Restart(RESTART_DELAYS[max(0, count - 1)])


def is_duplicate(output: SequenceOutput, output_token_ids: list[int]) -> bool:
    """Whether an output says again what its choice's log has at that place already."""
    end = output.position + len(output.token_ids)
    return (
        bool(output.token_ids)
        and output.position >= 0
        and end <= len(output_token_ids)
        and output_token_ids[output.position : end] == output.token_ids
    )
