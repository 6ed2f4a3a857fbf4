"""Guesses from what a sequence has said before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reprise.engine.drafter import MAX_DRAFT
from reprise.engine.prompt_lookup import NGRAM_SIZES, PromptLookup
from reprise.engine.sequence import Sequence
from reprise.types import SamplingParams


def sequence_of(*token_ids: int) -> Sequence:
    sampling = SamplingParams(seed=0, max_tokens=100)
    return Sequence(1, choice_index=0, prompt_token_ids=list(token_ids), sampling=sampling)


def guess(length: int, *token_ids: int) -> tuple[int, ...]:
    sequence = sequence_of(*token_ids)
    return PromptLookup().guess({sequence: length}).get(sequence, ())


def test_what_followed_the_same_tokens_last_time_is_proposed() -> None:
    text = (1, 2, 3, 4, 5, 9, 1, 2, 7, 8, 9, 1, 2)
    assert guess(2, *text) == (7, 8)
    assert guess(4, *text) == (7, 8, 9, 1)
    assert guess(7, *text) == (7, 8, 9, 1, 2)


def test_the_longest_run_decides() -> None:
    assert guess(1, 5, 1, 2, 3, 6, 2, 3, 7, 0, 1, 2, 3) == (6,)


def test_new_text_has_no_draft() -> None:
    assert guess(5, *range(30)) == ()
    assert guess(5, 1) == ()


def test_sequences_are_looked_up_each_in_its_own_text() -> None:
    one, other = sequence_of(1, 2, 3, 1, 2), sequence_of(1, 2, 4, 1, 2)
    lookup = PromptLookup()
    assert lookup.guess({one: 1, other: 1}) == {one: (3,), other: (4,)}
    lookup.forget(one)
    assert lookup.guess({one: 2, other: 2}) == {one: (3, 1), other: (4, 1)}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.data())
def test_a_draft_is_a_piece_of_the_text_behind_its_own_last_tokens(token_ids: list[int], data: st.DataObject) -> None:
    sequence = sequence_of(token_ids[0])
    lookup = PromptLookup()
    for token_id in token_ids[1:]:
        sequence.token_ids.append(token_id)
        draft = lookup.guess({sequence: data.draw(st.integers(1, MAX_DRAFT))}).get(sequence, ())
        text = sequence.token_ids
        suffixes = [tuple(text[-size:]) for size in NGRAM_SIZES if len(text) >= size]
        places = [
            end
            for end in range(len(text))
            for suffix in suffixes
            if tuple(text[max(0, end - len(suffix)) : end]) == suffix
        ]
        assert not draft or any(tuple(text[place : place + len(draft)]) == draft for place in places)
