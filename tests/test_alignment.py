"""Where an answer stands in a prediction of it."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from reprise.alignment import Alignment

TEXT = [*range(100, 140)]


def pushed(prediction: list[int], answer: list[int]) -> Alignment:
    alignment = Alignment(prediction)
    for token_id in answer:
        alignment.push(token_id)
    return alignment


def test_an_answer_as_predicted_is_followed_to_its_end() -> None:
    alignment = Alignment(TEXT)
    for index, token_id in enumerate(TEXT):
        assert alignment.next_token_ids(7) == tuple(TEXT[index : index + 7])
        alignment.push(token_id)
    assert alignment.next_token_ids(7) == ()
    assert (alignment.num_accepted, alignment.num_rejected) == (len(TEXT), 0)


def test_after_another_token_an_insertion_or_a_gap_it_is_found_again() -> None:
    for answer in (
        [*TEXT[:10], 7, *TEXT[11:13]],
        [*TEXT[:10], 7, 8, 9, *TEXT[11:13]],
        [*TEXT[:4], *TEXT[11:13]],
        [7, 8, *TEXT[11:13]],
    ):
        assert pushed(TEXT, answer[:-1]).next_token_ids(3) == ()
        assert pushed(TEXT, answer).next_token_ids(3) == tuple(TEXT[13:16])


def test_the_place_nearest_behind_the_last_one_is_taken_before_those_before_it() -> None:
    prediction = [1, 2, 50, 3, 4, 5, 1, 2, 51, 6, 1, 2, 52]
    assert pushed(prediction, [1, 2, 50, 3, 9, 1, 2]).next_token_ids(1) == (51,)
    assert pushed(prediction, [1, 2, 50, 3, 4, 5, 1, 2, 51, 9, 3, 4]).next_token_ids(1) == (5,)


def test_a_place_counts_once_however_often_the_answer_says_it() -> None:
    alignment = pushed(TEXT, [*TEXT[:10], *TEXT[:10], *TEXT[:10]])
    assert (alignment.num_accepted, alignment.num_rejected) == (10, 30)


def test_what_is_no_code_point_ends_the_prediction() -> None:
    alignment = Alignment([1, 2, 1 << 21, 3])
    assert alignment.next_token_ids(9) == (1, 2)
    alignment.push(1 << 21)
    assert alignment.next_token_ids(9) == ()


def test_a_long_repetitive_prediction_takes_no_long_time() -> None:
    """A token that is nowhere, and runs that are everywhere."""
    alignment = Alignment([5, 5, 5, 6] * 30_000)
    started = time.perf_counter()
    for _ in range(25):
        for token_id in (5, 5, 6, 6):
            alignment.push(token_id)
    assert time.perf_counter() - started < 1.0


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=60))
def test_guesses_stand_in_the_prediction_and_every_token_of_it_is_counted(
    prediction: list[int], answer: list[int]
) -> None:
    alignment = Alignment(prediction)
    for token_id in answer:
        alignment.push(token_id)
        draft = alignment.next_token_ids(5)
        assert not draft or any(tuple(prediction[i : i + len(draft)]) == draft for i in range(len(prediction)))
        assert alignment.num_accepted + alignment.num_rejected == len(prediction)
        assert alignment.num_accepted >= 0
    assert pushed(prediction, prediction).num_rejected == 0
