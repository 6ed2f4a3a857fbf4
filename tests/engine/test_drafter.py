"""How long drafts are, whose they are, and when there are none."""

from __future__ import annotations

from collections.abc import Mapping

from reprise.engine.drafter import MAX_DRAFT, REST, Draft, Drafter, DraftLength
from reprise.engine.prediction import Prediction
from reprise.engine.prompt_lookup import PromptLookup
from reprise.engine.sequence import Sequence
from reprise.types import SamplingParams


class Fixed:
    """Says the same of every sequence, and takes down what it was asked."""

    def __init__(self, draft: Draft, cost: float = 0.0) -> None:
        self.draft = draft
        self.cost = cost
        self.asked: list[int] = []
        self.forgotten: list[Sequence] = []

    def knows(self, sequence: Sequence) -> bool:  # noqa: ARG002 # about all of them
        return bool(self.draft)

    def guess(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, Draft]:
        self.asked += lengths.values()
        return {sequence: self.draft[:length] for sequence, length in lengths.items() if self.draft}

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence)


def sequence() -> Sequence:
    return Sequence(1, choice_index=0, prompt_token_ids=[1], sampling=SamplingParams(seed=0, max_tokens=100))


def test_drafts_get_longer_while_they_are_right_and_shorter_when_not() -> None:
    length = DraftLength()
    found = []
    for num_kept in (2, 4, 7, 3, 0, 1):
        found.append(length.at(1))
        length.note(found[-1], min(num_kept, found[-1]), 1)
    assert found == [2, 4, MAX_DRAFT, MAX_DRAFT, 3, 1]
    assert length.at(1) == 2


def test_after_useless_drafts_there_are_none_for_a_while() -> None:
    length = DraftLength()
    length.note(2, 0, 10)
    length.note(1, 0, 11)
    assert length.at(11 + REST - 1) == 0
    assert length.at(11 + REST) == 1


def test_drafts_that_cost_more_than_they_save_rest() -> None:
    """Half of them right: that pays where a guess costs little, and not where it costs most of a step."""

    def num_proposed(cost: float) -> int:
        length, count = DraftLength(cost), 0
        for num_tokens in range(200):
            proposed = length.at(num_tokens)
            if proposed:
                count += proposed
                length.note(proposed, proposed // 2 if proposed > 1 else num_tokens % 2, num_tokens)
        return count

    assert num_proposed(0.8) < num_proposed(0.1) / 2
    always_right = DraftLength(1.0)
    for num_tokens in range(100):
        always_right.note(2, 2, num_tokens)
        assert always_right.at(num_tokens)


def test_the_first_that_has_a_guess_is_taken_and_hears_of_it() -> None:
    first, second, one = Fixed(()), Fixed((5, 6, 7)), sequence()
    drafter = Drafter([first, second], 100)
    assert drafter.propose({one: 7}) == {one: (5, 6)}
    drafter.note(one, 2, 2)
    first.draft = (8, 9)
    assert drafter.propose({one: 7}) == {one: (8, 9)}
    assert second.asked == [2]
    for _ in range(2):
        drafter.note(one, 2, 0)
    assert drafter.propose({one: 7}) == {one: (5, 6, 7)}, "while the first rests"
    assert second.asked == [2, 4]


def test_nothing_is_asked_where_there_is_no_room() -> None:
    guesser, one = Fixed((1, 2)), sequence()
    assert Drafter([guesser], 100).propose({one: 0}) == {}
    assert guesser.asked == []


def test_a_draft_ends_before_what_the_model_does_not_know() -> None:
    guesser, one = Fixed((1, 2)), sequence()
    assert Drafter([guesser], 2).propose({one: 7}) == {one: (1,)}
    guesser.draft = (-1,)
    assert Drafter([guesser], 2).propose({one: 7}) == {}


def test_what_ended_is_forgotten_once() -> None:
    guesser, one = Fixed((1, 2)), sequence()
    drafter = Drafter([guesser], 100)
    drafter.forget(one)
    drafter.propose({one: 7})
    drafter.forget(one)
    drafter.forget(one)
    drafter.note(one, 2, 0)
    assert guesser.forgotten == [one]


def test_it_knows_of_a_sequence_what_any_of_its_guessers_does() -> None:
    nothing, something, one = Fixed(()), Fixed((1, 2)), sequence()
    assert Drafter([nothing, something], 100).knows(one)
    assert not Drafter([nothing], 100).knows(one)
    assert not Prediction().knows(one)
    parameters = SamplingParams(seed=0, max_tokens=100)
    assert Prediction().knows(
        Sequence(2, choice_index=0, prompt_token_ids=[1], sampling=parameters, prediction_token_ids=[5, 6])
    )
    assert PromptLookup().knows(one)
