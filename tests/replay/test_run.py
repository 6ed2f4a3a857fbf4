from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import msgspec
import pytest

from reprise.errors import GenerationError, UnavailableError
from reprise.replay.bundle import Bundle, Choice, Failure, Generation, Outcome
from reprise.replay.run import collect
from reprise.types import ChoiceDelta, FinishReason
from support.bundles import REQUEST, bundle, choice


class Deltas:
    """Gives items, and counts them."""

    def __init__(self, items: Sequence[ChoiceDelta | Exception]) -> None:
        self.items = items
        self.num_given = 0

    async def __aiter__(self) -> AsyncIterator[ChoiceDelta]:
        for item in self.items:
            self.num_given += 1
            if isinstance(item, Exception):
                raise item
            yield item


def run(of: Bundle, items: Sequence[ChoiceDelta | Exception]) -> tuple[list[Choice], Failure | None, int]:
    deltas = Deltas(items)
    generations, failure = asyncio.run(collect(of, [REQUEST], aiter(deltas)))
    return generations[0].choices, failure, deltas.num_given


def begun(*lengths: int, outcome: Outcome) -> Bundle:
    """A bundle whose choices stopped after so many tokens."""
    choices = [choice(*range(length), finish_reason=None) for length in lengths]
    return bundle(outcome=outcome, generations=[Generation(request=REQUEST, choices=choices)])


def tokens(index: int, number: int) -> list[ChoiceDelta]:
    return [ChoiceDelta(index=index, token_ids=[n], text="x") for n in range(number)]


def end(index: int) -> ChoiceDelta:
    return ChoiceDelta(index=index, finish_reason=FinishReason.LENGTH)


def test_a_complete_response_is_read_to_its_end() -> None:
    items = [*tokens(0, 3), end(0), *tokens(1, 5), end(1)]
    (first, second), failure, num_given = run(bundle(), items)
    assert (first.token_ids, second.token_ids, failure) == ([0, 1, 2], [0, 1, 2, 3, 4], None)
    assert (first.text, second.finish_reason) == ("xxx", "length")
    assert num_given == len(items)


def test_one_that_was_cut_off_is_read_as_far_as_it_came() -> None:
    items = [*tokens(0, 9), *tokens(1, 9)]
    (first, second), _, num_given = run(begun(2, 1, outcome="aborted"), items)
    assert (len(first.token_ids), len(second.token_ids), num_given) == (9, 1, 10)


def test_one_that_never_began_is_not_read_at_all() -> None:
    assert run(begun(0, 0, outcome="aborted"), tokens(0, 9))[2] == 0


def test_one_that_failed_is_read_until_the_error_is_due() -> None:
    failed = begun(2, 1, outcome="failed")
    _, failure, _ = run(failed, [*tokens(0, 2), *tokens(1, 1), GenerationError("broken", code="numerical_error")])
    assert failure == Failure(code="numerical_error", message="broken")
    _, failure, num_given = run(failed, [*tokens(0, 9), *tokens(1, 9)])
    assert (failure, num_given) == (None, 11)


def test_a_choice_that_had_ended_is_read_to_its_end() -> None:
    generation = Generation(request=REQUEST, choices=[choice(0, 1), choice(0, finish_reason=None)])
    (first, _), _, num_given = run(
        bundle(outcome="aborted", generations=[generation]), [*tokens(1, 1), *tokens(0, 2), end(0), *tokens(1, 5)]
    )
    assert (first.finish_reason, num_given) == ("length", 4)


def test_what_comes_before_an_error_is_kept() -> None:
    (first, _), failure, _ = run(bundle(), [*tokens(0, 2), GenerationError("a", code="b")])
    assert (first.token_ids, failure and failure.code) == ([0, 1], "b")


def test_a_lost_engine_is_no_result() -> None:
    with pytest.raises(UnavailableError):
        run(bundle(), [UnavailableError("gone")])


@pytest.mark.parametrize("code", ["capacity", "incomplete", "cancelled", "request_timeout"])
def test_what_circumstances_ended_is_no_result_either(code: str) -> None:
    with pytest.raises(GenerationError) as caught:
        run(bundle(), [*tokens(0, 2), GenerationError("a", code=code)])
    assert caught.value.code == code


def test_requests_may_be_varied() -> None:
    varied = msgspec.structs.replace(REQUEST, request_id="other")
    generations, _ = asyncio.run(collect(bundle(), [varied], aiter(Deltas([]))))
    assert generations[0].request is varied
