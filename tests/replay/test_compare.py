from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from reprise.replay.bundle import Choice, Logprobs
from reprise.replay.compare import ChoiceReport, Difference, Token, compare_choices
from support.bundles import choice

PROMPT = [5, 6, 7]


def spell(token_id: int) -> bytes:
    return f"<{token_id}>".encode()


def compare(expected: Choice, found: Choice, *, cut_off: bool = False) -> ChoiceReport:
    return compare_choices(expected, found, PROMPT, index=3, spell=spell, cut_off=cut_off)


def only(report: ChoiceReport) -> Difference:
    assert not report.identical
    (difference,) = report.differences
    return difference


def with_logprobs(of: Choice, column: str, position: int, value: Any, *, field: str = "logprobs") -> Choice:
    logprobs: Logprobs = getattr(of, field)
    changed = list(getattr(logprobs, column))
    changed[position] = value
    return msgspec.structs.replace(of, **{field: msgspec.structs.replace(logprobs, **{column: changed})})


def test_equal_choices_are_identical() -> None:
    report = compare(choice(10, 11, 12), choice(10, 11, 12))
    assert report == ChoiceReport(index=3, identical=True, num_tokens=3, complete=True, differences=[])


def test_a_differing_token_is_shown_with_what_is_known_of_it() -> None:
    expected = choice(10, 11, 12)
    expected = with_logprobs(expected, "top_token_ids", 1, [11, 99])
    expected = with_logprobs(expected, "top_logprobs", 1, [-2.3, -2.8])
    expected = with_logprobs(expected, "chosen", 1, -2.3)
    found = choice(10, 99, 12, text="other", finish_reason="stop")
    report = compare(expected, found)
    assert report.num_tokens == 1
    difference = only(report)
    assert (difference.kind, difference.position) == ("token", 1)
    assert difference.expected == Token(11, "<11>", -2.3)
    assert found.logprobs is not None
    assert difference.found == Token(99, "<99>", found.logprobs.chosen[1])
    assert difference.before == "<5><6><7><10>"
    assert difference.logprob_gap == -2.3 - -2.8


def test_what_was_found_tells_how_close_two_tokens_were_if_the_bundle_does_not() -> None:
    found = with_logprobs(choice(99), "top_token_ids", 0, [99, 10])
    found = with_logprobs(found, "top_logprobs", 0, [-1.0, -1.5])
    found = with_logprobs(found, "chosen", 0, -1.0)
    assert only(compare(choice(10, logprobs=None), found)).logprob_gap == -0.5
    assert only(compare(choice(10, logprobs=None), choice(99, logprobs=None))).logprob_gap is None


@pytest.mark.parametrize(("expected", "found"), [((10, 11), (10, 11, 12)), ((10, 11, 12), (10, 11))])
def test_a_choice_that_goes_on_differs_where_the_other_ends(expected: tuple[int, ...], found: tuple[int, ...]) -> None:
    difference = compare(choice(*expected), choice(*found)).differences[-1]
    assert (difference.kind, difference.position) == ("token", 2)
    assert (difference.expected is None, difference.found is None) == (len(expected) == 2, len(found) == 2)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_last_bit_of_a_log_probability_counts(position: int) -> None:
    expected = choice(10, 11, 12)
    assert expected.logprobs is not None
    before = expected.logprobs.chosen[position]
    assert isinstance(before, float)
    after = math.nextafter(before, 0)
    difference = only(compare(expected, with_logprobs(expected, "chosen", position, after)))
    assert (difference.kind, difference.position) == ("logprob", position)
    assert difference.expected == Token(10 + position, f"<{10 + position}>", before)
    assert difference.found == Token(10 + position, f"<{10 + position}>", after)
    assert difference.logprob_gap == after - before != 0


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("top_logprobs", [-2.3000000000000003, -99.0]),
        ("top_token_ids", [11, 8]),
        ("top_token_ids", [9, 11]),
    ],
)
def test_so_do_the_alternatives(column: str, value: Any) -> None:
    expected = with_logprobs(choice(10, 11, 12), "top_logprobs", 1, [-2.3000000000000003, "-inf"])
    difference = only(compare(expected, with_logprobs(expected, column, 1, value)))
    assert (difference.kind, difference.position) == ("top_logprob", 1)


def test_zeros_have_signs() -> None:
    expected = with_logprobs(choice(10), "chosen", 0, 0.0)
    difference = only(compare(expected, with_logprobs(expected, "chosen", 0, -0.0)))
    assert difference.kind == "logprob"


def test_the_prompts_log_probabilities_count_too() -> None:
    expected = choice(10)
    found = with_logprobs(expected, "chosen", 1, 0.0, field="prompt_logprobs")
    difference = only(compare(expected, found))
    assert (difference.kind, difference.position, difference.before) == ("prompt_logprob", 1, "<5>")
    found = with_logprobs(expected, "top_logprobs", 2, [-1.0], field="prompt_logprobs")
    assert only(compare(expected, found)).kind == "prompt_top_logprob"
    assert not compare(expected, choice(10, prompt_logprobs=None)).identical


def test_missing_log_probabilities_are_a_difference() -> None:
    assert only(compare(choice(10, 11), choice(10, 11, logprobs=None))).kind == "logprob"
    assert only(compare(choice(10, 11, logprobs=None), choice(10, 11))).position == 0


@pytest.mark.parametrize(
    ("changes", "kind", "position", "expected", "found"),
    [
        ({"text": "xyx"}, "text", 1, "xx", "yx"),
        ({"text": "xx"}, "text", 2, "x", ""),
        ({"finish_reason": "stop"}, "finish_reason", 3, "length", "stop"),
        ({"stop_reason": 12}, "stop_reason", 3, None, 12),
    ],
)
def test_with_equal_tokens_text_and_reasons_count(
    changes: dict[str, Any], kind: str, position: int, expected: object, found: object
) -> None:
    difference = only(compare(choice(10, 11, 12), choice(10, 11, 12, **changes)))
    assert (difference.kind, difference.position) == (kind, position)
    assert (difference.expected, difference.found) == (expected, found)


def test_an_unfinished_choice_is_compared_with_a_beginning() -> None:
    begun = choice(10, 11, finish_reason=None)
    whole = choice(10, 11, 12)
    report = compare(begun, whole)
    assert (report.identical, report.num_tokens, report.complete) == (True, 2, False)
    assert only(compare(begun, choice(10, 12, 11))).position == 1
    assert only(compare(choice(10, 11, finish_reason=None, text="xy"), whole)).kind == "text"
    assert not compare(begun, choice(10)).identical, "the other run ended earlier"
    nothing = Choice(token_ids=[], text="", finish_reason=None)
    assert compare(nothing, whole).identical


def cut(*token_ids: int, **changes: Any) -> Choice:
    """A choice that ended with its response's failure."""
    return choice(*token_ids, finish_reason=None, **changes)


@pytest.mark.parametrize(
    ("expected", "found", "num_tokens"),
    [
        (cut(10, 11), cut(10, 11, 12), 2),
        (cut(10, 11, 12), cut(10, 11), 2),
        (choice(10, 11, 12), cut(10, 11), 2),
        (cut(10, 11), choice(10, 11, 12), 2),
        (choice(10, 11), Choice(token_ids=[], text="", finish_reason=None), 0),
        (cut(10, 11, text="x"), cut(10, text=""), 1),
    ],
)
def test_two_choices_that_a_failure_cut_are_compared_up_to_the_shorter(
    expected: Choice, found: Choice, num_tokens: int
) -> None:
    report = compare(expected, found, cut_off=True)
    assert (report.identical, report.num_tokens, report.complete) == (True, num_tokens, False)


@pytest.mark.parametrize(
    ("expected", "found", "kind", "position"),
    [
        (cut(10, 11, 12), cut(10, 99), "token", 1),
        (choice(10, 11, 12), cut(10, 99), "token", 1),
        (cut(10, 11, 12), choice(10, 11), "token", 2),
        (choice(10, 11), cut(10, 11, 12), "token", 2),
        (cut(10, 11, 12, text="xyx"), cut(10, 11, text="xx"), "text", 1),
        (cut(10, 11, 12), with_logprobs(cut(10, 11), "chosen", 1, -7.0), "logprob", 1),
        (cut(10, 11, 12), with_logprobs(cut(10), "chosen", 1, 0.0, field="prompt_logprobs"), "prompt_logprob", 1),
        (choice(10, 11), choice(10, 11, finish_reason="stop"), "finish_reason", 2),
    ],
)
def test_what_both_of_them_have_is_equal_all_the_same(
    expected: Choice, found: Choice, kind: str, position: int
) -> None:
    difference = compare(expected, found, cut_off=True).differences[0]
    assert (difference.kind, difference.position) == (kind, position)


def test_differences_come_in_the_order_of_their_tokens() -> None:
    expected = choice(10, 11, 12)
    found = with_logprobs(choice(10, 11, 99), "chosen", 0, -7.0)
    found = with_logprobs(found, "chosen", 1, -7.0, field="prompt_logprobs")
    report = compare(expected, found)
    kinds = [(difference.kind, difference.position) for difference in report.differences]
    assert kinds == [("prompt_logprob", 1), ("logprob", 0), ("token", 2)]
