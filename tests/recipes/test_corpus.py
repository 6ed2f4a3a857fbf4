"""The training text: the same each time, and consistent with itself."""

import itertools
from collections import defaultdict

from recipes.pocket.conversations import training_texts
from recipes.pocket.corpus import intents
from recipes.pocket.questions import held_out, published


def test_the_same_seed_writes_the_same_texts() -> None:
    one, same, other = (list(itertools.islice(training_texts(seed, lambda _: True), 500)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_no_wording_means_two_things() -> None:
    meanings = defaultdict(set)
    for intent in intents():
        for wording in intent.wordings:
            meanings[wording.casefold()].add((intent.name, intent.language))
    assert {wording: names for wording, names in meanings.items() if len(names) > 1} == {}


def test_each_answer_is_accepted() -> None:
    for intent in intents():
        for answer in intent.answers:
            assert any(part.casefold() in answer.casefold() for part in intent.accept), intent


def test_held_out_wordings_are_never_trained_on() -> None:
    kept = {turn for question in held_out(10_000) for turn in question.turns}
    assert len(kept) > 1000
    trained = {wording for intent in intents() for wording in intent.trained_wordings}
    assert not kept & trained
    assert not kept & {question.turns[0] for question in published()}


def test_a_text_begins_and_ends() -> None:
    for pieces in itertools.islice(training_texts(3, lambda _: True), 200):
        assert pieces[0][0] == "<|begin|>"
        assert pieces[-1][0] == "<|end|>"
        assert pieces[-1][1] == 1.0


def test_a_text_fits_when_it_must() -> None:
    for pieces in itertools.islice(training_texts(4, lambda pieces: len(pieces) <= 13), 2000):
        assert len(pieces) <= 13
