"""The supervisor's decisions: what hangs, who is tried and convicted, when it is enough."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reprise.generation.supervision import (
    LOADING_PATIENCE,
    MAX_DEATHS,
    MAX_DEATHS_IN_A_ROW,
    RESTART_DELAYS,
    HangLimits,
    Restart,
    RestartPolicy,
    Suspects,
    Watchdog,
    is_duplicate,
)
from reprise.ipc.messages import SequenceOutput

LIMITS = HangLimits(heartbeat_timeout=10, step_timeout=300, load_timeout=1000)


def watch(
    seconds: float, *, heartbeat: bool = False, steps: bool = False, loading: bool = False
) -> tuple[str | None, float]:
    """Look at an engine that stays the same: the first verdict and when it came."""
    watchdog = Watchdog(LIMITS, 100.0)
    now = 100.0
    while now < 100.0 + seconds:
        now += watchdog.interval
        if heartbeat:
            watchdog.heard()
        if steps:
            watchdog.progressed()
        reason = watchdog.look(now, loading=loading)
        if reason is not None:
            return reason, now - 100.0
    return None, seconds


def test_silence_is_a_hang_sooner_while_serving_than_while_loading() -> None:
    reason, after = watch(100)
    assert reason is not None
    assert "no sign of life" in reason
    assert 10 < after <= 11
    reason, after = watch(100, loading=True)
    assert reason is not None
    assert 10 * LOADING_PATIENCE < after <= 10 * LOADING_PATIENCE + 1


def test_a_long_step_with_a_heartbeat_is_none_until_the_step_timeout() -> None:
    assert watch(300, heartbeat=True) == (None, 300)
    reason, after = watch(400, heartbeat=True)
    assert reason is not None
    assert "no step for 301." in reason
    assert 301 < after <= 302


def test_stepping_is_none() -> None:
    assert watch(2000, heartbeat=True, steps=True)[0] is None


def test_loading_for_ever_is_a_hang() -> None:
    assert watch(999, heartbeat=True, loading=True)[0] is None
    reason, _ = watch(1100, heartbeat=True, loading=True)
    assert reason is not None
    assert "loading" in reason


def test_what_the_supervisor_slept_through_does_not_count() -> None:
    """The whole group was stopped for an hour: the heartbeats are in the socket, unread."""
    watchdog = Watchdog(LIMITS, 0.0)
    assert watchdog.look(3600.0, loading=False) is None
    watchdog.heard()
    assert watchdog.look(3601.0, loading=False) is None


def running(*requests: list[int]) -> Suspects:
    """Requests of these choices, in a ready engine."""
    suspects = Suspects()
    for choices in requests:
        suspects.add(choices)
    revive(suspects)
    return suspects


def revive(suspects: Suspects) -> list[int]:
    """A new life; what is added to it."""
    suspects.ready()
    moves = suspects.moves()
    assert moves.withdraw == []
    return moves.add


def test_nobody_is_in_an_engine_that_is_not_ready() -> None:
    suspects = Suspects()
    suspects.add([1, 2])
    assert suspects.moves().add == []
    assert revive(suspects) == [1, 2]
    assert suspects.moves().add == []


def test_a_death_after_progress_accuses_nobody_for_long() -> None:
    suspects = running([1], [2])
    for _ in range(30):
        assert suspects.died(killed=False) is None
        assert not suspects.on_trial
        assert revive(suspects) == [1, 2]
        for choice in (1, 2):
            assert not suspects.delivered(choice, 1)
            assert not suspects.delivered(choice, 1)


def test_suspects_are_tried_alone_oldest_first_and_the_guilty_one_is_convicted() -> None:
    suspects = running([1], [2], [3])
    assert suspects.died(killed=False) is None
    assert revive(suspects) == [1, 2, 3]
    assert suspects.died(killed=False) is None
    assert suspects.on_trial
    assert revive(suspects) == [1]
    suspects.add([4])
    assert suspects.moves().add == []
    assert not suspects.delivered(1, 1)
    assert suspects.delivered(1, 1)
    moves = suspects.moves()
    assert (moves.withdraw, moves.add) == ([1], [2])
    suspects.left(1)
    conviction = suspects.died(killed=False)
    assert conviction is not None
    assert (conviction.choice_ids, conviction.num_deaths) == ([2], 3)
    suspects.remove(2)
    assert revive(suspects) == [3]
    assert suspects.delivered(3, 2)
    assert not suspects.on_trial
    assert suspects.moves().add == [1, 4]


def test_a_request_that_was_alone_at_two_deaths_needs_no_trial() -> None:
    suspects = running([1])
    assert suspects.died(killed=False) is None
    suspects.add([2])
    suspects.remove(2)
    assert revive(suspects) == [1]
    conviction = suspects.died(killed=False)
    assert conviction is not None
    assert (conviction.choice_ids, conviction.num_deaths) == ([1], 2)


def test_somebody_who_kills_the_engine_has_to_hit_the_same_request_once_more() -> None:
    suspects = running([1])
    for _ in range(2):
        assert suspects.died(killed=True) is None
        revive(suspects)
    assert suspects.died(killed=True) is not None
    suspects = running([1], [2])
    for _ in range(3):
        assert suspects.died(killed=True) is None
        revive(suspects)
    conviction = suspects.died(killed=True)
    assert conviction is not None
    assert conviction.choice_ids == [1]


def test_all_choices_of_a_request_are_one() -> None:
    suspects = running([1, 2, 3], [4])
    suspects.died(killed=False)
    revive(suspects)
    suspects.died(killed=False)
    assert revive(suspects) == [1, 2, 3]
    assert not suspects.delivered(1, 2)
    assert not suspects.delivered(2, 2)
    conviction = suspects.died(killed=False)
    assert conviction is not None
    assert conviction.choice_ids == [1, 2, 3]


def test_a_suspect_that_ends_is_no_suspect() -> None:
    suspects = running([1], [2])
    suspects.died(killed=False)
    revive(suspects)
    suspects.died(killed=False)
    assert revive(suspects) == [1]
    suspects.remove(1)
    assert suspects.moves().add == [2]
    suspects.remove(2)
    suspects.remove(2)
    assert not suspects.on_trial


def test_who_waits_during_a_trial_is_not_accused() -> None:
    suspects = running([1], [2])
    suspects.died(killed=False)
    revive(suspects)
    suspects.delivered(2, 2)
    suspects.died(killed=False)
    assert revive(suspects) == [1]
    assert suspects.died(killed=False) is not None
    suspects.remove(1)
    assert revive(suspects) == [2]
    assert not suspects.on_trial


def test_who_left_the_engine_that_is_at_its_last_step_is_there_when_it_dies() -> None:
    """Its client gave it up, because the engine hangs over it."""
    suspects = running([1])
    for guilty in (2, 3):
        suspects.add([guilty])
        suspects.moves()
        suspects.remove(guilty)
        assert suspects.died(killed=False) is None
        assert revive(suspects) == [1]
    assert suspects.on_trial
    assert suspects.delivered(1, 2)


def test_who_has_left_the_engine_is_not_there_when_it_dies() -> None:
    suspects = running([1], [2])
    assert suspects.died(killed=False) is None
    revive(suspects)
    suspects.remove(2)
    suspects.left(2)
    assert suspects.died(killed=False) is None
    assert revive(suspects) == [1]
    assert suspects.died(killed=False) is not None


def test_a_stay_that_has_ended_says_nothing_of_a_later_one() -> None:
    """Withdrawn twice before the engine has said that it is done with it once."""
    suspects = running([1], [2])
    suspects.died(killed=False)
    revive(suspects)
    suspects.died(killed=False)
    assert revive(suspects) == [1]
    assert suspects.delivered(1, 2)
    assert suspects.moves().withdraw == [1]
    assert suspects.delivered(2, 2)
    assert suspects.moves().add == [1]
    suspects.remove(1)
    suspects.left(1)
    assert suspects.died(killed=False) is None
    assert revive(suspects) == [2]
    assert suspects.died(killed=False) is None
    suspects.add([3])
    assert revive(suspects) == [2], "who died once beside another and once alone is tried"


@dataclass
class World:
    """Requests with lengths, some of them poison: the engine dies when it is to compute the n-th token of one."""

    suspects: Suspects = field(default_factory=Suspects)
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    lengths: dict[int, int] = field(default_factory=dict)
    poison: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    inside: set[int] = field(default_factory=set)
    leaving: list[int] = field(default_factory=list)
    """Taken out since the engine last looked."""
    num_given_up: dict[int, int] = field(default_factory=dict)
    """By request: how many more times its client leaves when the engine hangs over it, and asks again."""
    convicted: set[int] = field(default_factory=set)
    killed: bool = False
    """Whether the engine dies of a SIGKILL, as of the kernel where memory runs out."""
    now: float = 0.0

    def ask(self, number: int, num_choices: int, length: int, poison: int | None, attempt: int = 0) -> None:
        choices = [number * 100 + attempt * 10 + index for index in range(num_choices)]
        self.suspects.add(choices)
        for choice in choices:
            self.tokens[choice] = 0
            self.lengths[choice] = length
            if poison is not None and poison < length:
                self.poison[choice] = poison

    def move(self) -> None:
        moves = self.suspects.moves()
        self.inside.difference_update(moves.withdraw)
        self.leaving += moves.withdraw
        self.inside.update(moves.add)

    def take_out(self, choice: int) -> None:
        if choice in self.inside:
            self.inside.discard(choice)
            self.leaving.append(choice)
        self.suspects.remove(choice)

    def leave(self) -> None:
        """Impatient clients of requests that the engine hangs over ask again."""
        for number in sorted({i // 100 for i in self.inside if self.tokens[i] >= self.poison.get(i, self.lengths[i])}):
            if self.num_given_up[number]:
                self.num_given_up[number] -= 1
                choices = [i for i in self.tokens if i // 100 == number]
                for choice in choices:
                    self.take_out(choice)
                    del self.tokens[choice]
                last = choices[-1]
                self.ask(number, len(choices), self.lengths[last], self.poison[last], last % 100 // 10 + 1)

    def live(self, num_steps: int, random: Random) -> str | None:
        """One life of at most so many steps; somebody else's crash ends it. Why it is given up, if it is."""
        self.policy.began()
        self.policy.ready(self.now)
        self.suspects.ready()
        self.move()
        for _ in range(num_steps):
            self.now += 1.0
            for choice in self.leaving:
                self.suspects.left(choice)
            self.leaving.clear()
            if any(self.tokens[i] >= self.poison[i] for i in self.inside if i in self.poison):
                self.leave()
                break
            for choice in random.sample(sorted(self.inside), len(self.inside)):
                if choice not in self.inside:
                    continue  # was withdrawn in this very step
                self.tokens[choice] += 1
                self.policy.delivered()
                cleared = self.suspects.delivered(choice, 1)
                if self.tokens[choice] >= self.lengths[choice]:
                    self.take_out(choice)
                    cleared = True
                if cleared:
                    self.move()
        conviction = self.suspects.died(killed=self.killed)
        self.inside.clear()
        self.leaving.clear()
        for choice in conviction.choice_ids if conviction else []:
            self.convicted.add(choice)
            self.suspects.remove(choice)
        return self.policy.died(self.now, explained=conviction.deaths if conviction else ()).given_up


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 12), st.none() | st.integers(0, 8), st.integers(0, 4)),
        min_size=1,
        max_size=6,
    ),
    killed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_poison_is_convicted_and_nobody_else(
    requests: list[tuple[int, int, int | None, int]], killed: bool, seed: int
) -> None:
    """Choices, tokens, and for a poisonous request the token that kills and how often its client asks again.

    Nothing else ends the engine.
    """
    world = World(killed=killed)
    for number, (num_choices, length, poison, num_given_up) in enumerate(requests):
        world.num_given_up[number] = num_given_up
        world.ask(number, num_choices, length, poison)
    guilty = {choice // 100 for choice in world.poison}
    impatient = any(world.num_given_up[number] for number in guilty)
    lives = 0
    while world.tokens.keys() - world.convicted - {i for i in world.tokens if world.tokens[i] >= world.lengths[i]}:
        lives += 1
        assert lives < 10 * sum(1 + num_given_up for *_, num_given_up in requests)
        given_up = world.live(100, Random(seed))
        assert given_up is None or impatient, "given up, though every death had its reason"
        if given_up is not None:
            return
    assert {choice // 100 for choice in world.convicted} == guilty
    for choice in world.tokens:
        assert world.tokens[choice] == world.lengths[choice] or choice // 100 in guilty


def fruitless(
    policy: RestartPolicy, now: float, *, seconds: float | None = 0.1, explained: Collection[int] = ()
) -> Restart:
    """A life without a token: ready for so many seconds, or never."""
    policy.began()
    if seconds is not None:
        policy.ready(now - seconds)
    return policy.died(now, explained=explained)


@pytest.mark.parametrize("seconds", [None, 0.1])
def test_lives_that_get_nothing_done_are_ever_later_and_then_no_more(seconds: float | None) -> None:
    policy = RestartPolicy()
    found = [fruitless(policy, 100.0, seconds=seconds) for _ in range(MAX_DEATHS)]
    assert [restart.delay for restart in found[:-1]] == list(RESTART_DELAYS[: MAX_DEATHS - 1])
    assert all(restart.given_up is None for restart in found[:-1])
    assert found[-1].given_up is not None
    assert "died 4 times" in found[-1].given_up
    assert ("while loading" in found[-1].given_up) == (seconds is None)


def test_thirty_deaths_under_load_are_thirty_pauses() -> None:
    policy = RestartPolicy()
    for number in range(30):
        policy.began()
        policy.ready(number)
        policy.delivered()
        assert policy.died(number + 0.5) == Restart()


def test_a_token_wipes_out_what_was_before() -> None:
    policy = RestartPolicy()
    for _ in range(5):
        for _ in range(MAX_DEATHS - 1):
            assert fruitless(policy, 10.0).given_up is None
        policy.began()
        policy.ready(10.0)
        policy.delivered()
        policy.died(10.0)


def test_an_idle_engine_may_die_now_and_then() -> None:
    policy = RestartPolicy()
    assert all(fruitless(policy, 1000.0 * n, seconds=100.0) == Restart() for n in range(20))
    assert all(fruitless(policy, 1000.0 * n, seconds=16.0).given_up is None for n in range(10))


def test_a_conviction_explains_the_deaths_that_it_names_and_no_others() -> None:
    policy = RestartPolicy()
    assert [fruitless(policy, 10.0).delay for _ in range(3)] == list(RESTART_DELAYS[:3])
    assert fruitless(policy, 10.0, explained=(2, 3, 4)) == Restart(RESTART_DELAYS[0])
    assert [fruitless(policy, 10.0).delay for _ in range(2)] == list(RESTART_DELAYS[1:3])
    assert fruitless(policy, 10.0).given_up is not None


def test_convictions_explain_deaths_but_not_for_ever() -> None:
    policy = RestartPolicy()
    found = [
        fruitless(policy, 10.0, explained=(n - 2, n - 1, n) if n % 3 == 0 else ()).given_up
        for n in range(1, MAX_DEATHS_IN_A_ROW + 1)
    ]
    assert found[:-1] == [None] * (MAX_DEATHS_IN_A_ROW - 1)
    assert found[-1] is not None


@pytest.mark.parametrize(("killed", "num_deaths"), [(False, 2), (True, 3)])
def test_requests_that_end_the_engine_one_after_the_other_do_not_end_the_server(killed: bool, num_deaths: int) -> None:
    suspects, policy = Suspects(), RestartPolicy()
    for choice in range((MAX_DEATHS_IN_A_ROW - 1) // num_deaths):
        suspects.add([choice])
        conviction = None
        while conviction is None:
            policy.began()
            policy.ready(10.0)
            revive(suspects)
            conviction = suspects.died(killed=killed)
            assert policy.died(10.0, explained=conviction.deaths if conviction else ()).given_up is None
        assert conviction.num_deaths == num_deaths
        suspects.remove(choice)


def test_who_is_tried_does_not_answer_for_deaths_that_it_slept_through() -> None:
    """Two requests that kill: the second one waits while the first is tried, and when the idle engine dies."""
    suspects = running([1], [2])
    found = []
    for _ in range(4):
        found.append(suspects.died(killed=True))
        revive(suspects)
    conviction = found.pop()
    assert found == [None] * 3
    assert conviction is not None
    assert (conviction.choice_ids, conviction.deaths) == ([1], [1, 2, 3, 4])
    suspects.remove(1)
    assert suspects.died(killed=True) is None
    revive(suspects)
    assert suspects.died(killed=True) is None
    revive(suspects)
    conviction = suspects.died(killed=True)
    assert conviction is not None
    assert (conviction.choice_ids, conviction.deaths) == ([2], [1, 2, 6, 7])


@settings(deadline=None)
@given(position=st.integers(-3, 8), token_ids=st.lists(st.integers(0, 2), max_size=4))
def test_a_duplicate_says_what_the_log_has(position: int, token_ids: list[int]) -> None:
    log = [0, 1, 2, 0, 1]
    found = is_duplicate(SequenceOutput(sequence_id=1, position=position, token_ids=token_ids), log)
    places = [n for n in range(len(log)) if token_ids and log[n : n + len(token_ids)] == token_ids]
    assert found == (position in places)
