"""Drafts from what a sequence has said before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reprise.engine.prompt_lookup import MAX_DRAFT, NGRAM_SIZES, REST, PromptLookup
from reprise.engine.sequence import Sequence
from reprise.types import SamplingParams


def sequence_of(*token_ids: int) -> Sequence:
    sampling = SamplingParams(seed=0, max_tokens=100)
    return Sequence(1, choice_index=0, prompt_token_ids=list(token_ids), sampling=sampling)


def test_what_followed_the_same_tokens_last_time_is_proposed() -> None:
    lookup = PromptLookup(sequence_of(1, 2, 3, 4, 5, 9, 1, 2, 7, 8, 9, 1, 2))
    assert lookup.propose(7) == (7, 8)
    lookup.note(2, 2)
    assert lookup.propose(7) == (7, 8, 9, 1)
    assert lookup.propose(3) == (7, 8, 9)
    assert lookup.propose(0) == ()


def test_the_longest_run_decides() -> None:
    assert PromptLookup(sequence_of(5, 1, 2, 3, 6, 2, 3, 7, 0, 1, 2, 3)).propose(1) == (6,)


def test_new_text_has_no_draft() -> None:
    assert PromptLookup(sequence_of(*range(30))).propose(5) == ()
    assert PromptLookup(sequence_of(1)).propose(5) == ()


def test_after_useless_drafts_it_rests() -> None:
    sequence = sequence_of(*[1, 2, 3] * 4)
    lookup = PromptLookup(sequence)
    while lookup.propose(MAX_DRAFT):
        lookup.note(1, 0)
    sequence.token_ids += [1, 2, 3] * REST
    assert len(lookup.propose(MAX_DRAFT)) == 1


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.data())
def test_a_draft_is_a_piece_of_the_text_behind_its_own_last_tokens(token_ids: list[int], data: st.DataObject) -> None:
    sequence = sequence_of(token_ids[0])
    lookup = PromptLookup(sequence)
    for token_id in token_ids[1:]:
        sequence.token_ids.append(token_id)
        draft = lookup.propose(data.draw(st.integers(0, MAX_DRAFT)))
        text = sequence.token_ids
        suffixes = [tuple(text[-size:]) for size in NGRAM_SIZES if len(text) >= size]
        places = [
            end
            for end in range(len(text))
            for suffix in suffixes
            if tuple(text[max(0, end - len(suffix)) : end]) == suffix
        ]
        assert not draft or any(tuple(text[place : place + len(draft)]) == draft for place in places)
        lookup.note(len(draft), data.draw(st.integers(0, len(draft))))
