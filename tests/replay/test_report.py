from __future__ import annotations

from typing import Any

import msgspec
import pytest

from reprise.replay.bundle import Bundle, Choice, Failure, Generation
from reprise.replay.facts import ServedText
from reprise.replay.report import Report, make_report, render
from support.bundles import REQUEST, TEXT, bundle, choice
from support.scripted_engine import READY

BROKEN = Failure(code="numerical_error", message="broken")


def spell(token_id: int) -> bytes:
    return f"<{token_id}>".encode()


def report(of: Bundle, *, found_error: Failure | None = None, text: ServedText = TEXT, **facts: Any) -> Report:
    found = [Generation(request=REQUEST, choices=[choice(10, 11, 12), choice(20, 21, 22)])]
    info = msgspec.structs.replace(READY, **facts)
    return make_report(of, found, found_error, info=info, text=text, spell=spell)


def test_nothing_differs() -> None:
    found = report(bundle())
    assert (found.identical, found.same_fingerprint, found.changes) == (True, True, [])
    assert [each.index for each in found.choices] == [0, 1]
    assert render(found).splitlines() == [
        "cmpl-1: identical",
        "  choice 0: identical: 3 tokens",
        "  choice 1: identical: 3 tokens",
    ]


def test_other_circumstances_are_told_though_nothing_differs() -> None:
    found = report(
        bundle(), numerics_fingerprint="0", dtype="bfloat16", kernels="native, avx2", tier_reason="x", load_seconds=9
    )
    assert (found.identical, found.same_fingerprint) == (True, False)
    assert [(change.name, change.expected, change.found) for change in found.changes] == [
        ("kernels", "torch", "native, avx2"),
        ("dtype", "float32", "bfloat16"),
        ("numerics_fingerprint", "feedbeef", "0"),
    ]
    assert render(found).splitlines()[1:5] == [
        "  here kernels is 'native, avx2', in the bundle 'torch'",
        "  here dtype is 'bfloat16', in the bundle 'float32'",
        "  here numerics_fingerprint is '0', in the bundle 'feedbeef'",
        "  the system fingerprint is another one: other bits may be expected",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chat_template_fingerprint", None),
        ("chat_template_fingerprint", "other"),
        ("generation_defaults", {}),
        ("start_token_ids", (5,)),
    ],
)
def test_what_a_request_was_made_by_is_no_change_once_it_is_recorded(name: str, value: object) -> None:
    found = report(bundle(), text=msgspec.structs.replace(TEXT, **{name: value}))
    assert (found.identical, found.same_fingerprint, found.changes) == (True, True, [])


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("tokenizer_fingerprint", "x", "  here tokenizer_fingerprint is 'x', in the bundle '0123456789abcdef'"),
        ("end_token_ids", (4,), "  here end_token_ids is (4,), in the bundle (2, 3)"),
    ],
)
def test_what_makes_tokens_into_text_is(name: str, value: object, line: str) -> None:
    found = report(bundle(), text=msgspec.structs.replace(TEXT, **{name: value}))
    assert (found.same_fingerprint, [change.name for change in found.changes]) == (False, [name])
    assert line in render(found)


def test_a_difference_is_shown_in_its_place() -> None:
    other = Generation(request=REQUEST, choices=[choice(10, 11, 12), choice(20, 99, 22)])
    text = render(report(bundle(generations=[other])))
    assert text.splitlines() == [
        "cmpl-1: DIFFERENT",
        "  choice 0: identical: 3 tokens",
        "  choice 1: identical up to token 1",
        "    first difference in token 1",
        "      after    '<5><6><7><20>'",
        "      expected 99 '<99>'  log-probability -19.900000000000002",
        "      found    21 '<21>'  log-probability -4.3",
    ]


def test_an_errors_code_is_expected_again() -> None:
    of = bundle(outcome="failed", error=BROKEN)
    assert report(of, found_error=BROKEN).identical
    assert not report(of).identical
    assert not report(bundle(), found_error=BROKEN).identical
    assert render(report(of)).endswith("error: expected numerical_error (broken), found none")


def failed(*choices: Choice) -> Bundle:
    """A response of which one choice failed."""
    request = msgspec.structs.replace(REQUEST, num_choices=len(choices))
    return bundle(outcome="failed", error=BROKEN, generations=[Generation(request=request, choices=list(choices))])


def again(of: Bundle, *choices: Choice, error: Failure | None = BROKEN) -> Report:
    found = [Generation(request=of.generations[0].request, choices=list(choices))]
    return make_report(of, found, error, info=READY, text=TEXT, spell=spell)


def test_where_one_choice_failed_the_others_were_cut_anywhere() -> None:
    of = failed(choice(10, finish_reason=None), choice(20, 21, 22, finish_reason=None))
    shorter = choice(10, finish_reason=None), choice(20, 21, finish_reason=None)
    found = again(of, *shorter)
    assert found.identical
    assert "  choice 1: identical: 2 tokens, as far as both runs go" in render(found)
    assert not again(of, *shorter, error=None).identical
    differing = again(of, choice(10, finish_reason=None), choice(20, 99, finish_reason=None))
    assert [each.identical for each in differing.choices] == [True, False]


def test_a_choice_alone_fails_at_the_same_token() -> None:
    of = failed(choice(10, 11, finish_reason=None))
    assert again(of, choice(10, 11, finish_reason=None)).identical
    assert not again(of, choice(10, finish_reason=None)).identical


def test_circumstances_that_cut_a_response_off_are_not() -> None:
    error = Failure(code="request_timeout", message="late")
    assert report(bundle(outcome="aborted", error=error)).identical


def test_nothing_of_a_bundle_is_a_terminals_command() -> None:
    error = Failure(code="\x1b]0;x\x07", message="a\x9b2J\nb\u202e \N{SNOWMAN}")
    text = render(report(bundle(id="cmpl-\x1b[2J", outcome="failed", error=error)))
    assert all(line.isprintable() for line in text.split("\n"))
    assert "cmpl-\\x1b[2J: DIFFERENT" in text
    assert "a\\x9b2J\\nb\\u202e \N{SNOWMAN}" in text
