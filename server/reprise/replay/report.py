"""What running a response again gave, as JSON and as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from reprise.ipc.messages import Ready
from reprise.printable import printable
from reprise.replay.bundle import Bundle, Failure, Generation
from reprise.replay.compare import ChoiceReport, Difference, Spell, Token, compare_generations
from reprise.replay.facts import NO_CAUSE, ServedModel, ServedText, software, system_fingerprint

_WORDS = {
    "prompt_logprob": "log-probability of prompt token",
    "prompt_top_logprob": "an alternative's log-probability at prompt token",
    "logprob": "log-probability of token",
    "top_logprob": "an alternative's log-probability at token",
    "token": "token",
    "text": "text at character",
    "finish_reason": "finish reason after token",
    "stop_reason": "stop reason after token",
}
Fact = str | int | bool | tuple[int, ...]


class Change(msgspec.Struct, frozen=True):
    """A fact that differs between the bundle and where it was run again."""

    name: str
    expected: Fact
    found: Fact


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What running one response again gave."""

    id: str
    identical: bool
    same_fingerprint: bool
    """Whether the system fingerprint is the bundle's, the chat template and sampling defaults that the request was made
    by aside. If not, other bits may be expected."""
    changes: list[Change]
    """Of the facts that bits may depend on, those that are different here."""
    expected_error: Failure | None
    """The request's own, if it failed; errors are the same where their codes are."""
    found_error: Failure | None
    choices: list[ChoiceReport]


def make_report(
    bundle: Bundle,
    found: Sequence[Generation],
    found_error: Failure | None,
    *,
    info: Ready,
    text: ServedText,
    spell: Spell,
) -> Report:
    """Compare a bundle with what another run of it gave, on the model that `info` and `text` tell of."""
    model, text = ServedModel.of(info), text.with_requests_of(bundle.text)
    expected_error = bundle.error if bundle.outcome == "failed" else None
    codes = [None if error is None else error.code for error in (expected_error, found_error)]
    # Where one of several choices fails, the others end wherever they happen to be. Which it was is not recorded.
    cut_off = bundle.outcome == "failed" and found_error is not None and len(bundle.choices) > 1
    choices = compare_generations(bundle.generations, found, spell=spell, cut_off=cut_off)
    return Report(
        id=bundle.id,
        identical=codes[0] == codes[1] and all(choice.identical for choice in choices),
        same_fingerprint=bundle.system_fingerprint == system_fingerprint(model, text),
        changes=changes(bundle, model, text),
        expected_error=expected_error,
        found_error=found_error,
        choices=choices,
    )


def changes(bundle: Bundle, model: ServedModel, text: ServedText) -> list[Change]:
    """What differs from the bundle's circumstances where it is run now."""
    pairs: tuple[tuple[msgspec.Struct, msgspec.Struct], ...] = (
        (bundle.software, software()),
        (bundle.model, model),
        (bundle.text, text),
    )
    return [
        Change(name, expected, found)
        for then, now in pairs
        for name in then.__struct_fields__
        if (expected := getattr(then, name)) != (found := getattr(now, name)) and name not in NO_CAUSE
    ]


def render(report: Report) -> str:
    """The report for people. A bundle is anybody's file: none of its characters reaches a terminal as a command."""
    return "\n".join(map(printable, _lines(report)))


def _lines(report: Report) -> Iterator[str]:
    yield f"{report.id}: {'identical' if report.identical else 'DIFFERENT'}"
    for change in report.changes:
        yield f"  here {change.name} is {change.found!r}, in the bundle {change.expected!r}"
    if not report.same_fingerprint:
        yield "  the system fingerprint is another one: other bits may be expected"
    for choice in report.choices:
        extent = "" if choice.complete else ", as far as both runs go"
        if choice.identical:
            yield f"  choice {choice.index}: identical: {_tokens(choice.num_tokens)}{extent}"
            continue
        yield f"  choice {choice.index}: identical up to token {choice.num_tokens}"
        for difference in choice.differences:
            yield from _of_difference(difference)
    if report.found_error is not None or report.expected_error is not None:
        yield f"  error: expected {_error(report.expected_error)}, found {_error(report.found_error)}"


def _of_difference(difference: Difference) -> Iterator[str]:
    yield f"    first difference in {_WORDS[difference.kind]} {difference.position}"
    yield f"      after    {difference.before!r}"
    yield f"      expected {_shown(difference.expected)}"
    yield f"      found    {_shown(difference.found)}"
    if difference.logprob_gap is None:
        return
    if difference.kind == "token":
        yield f"      the expected one was likelier by {difference.logprob_gap!r}"
    else:
        yield f"      found minus expected: {difference.logprob_gap!r}"


def _shown(value: Token | str | int | None) -> str:
    match value:
        case None:
            return "nothing"
        case Token():
            logprob = "" if value.logprob is None else f"  log-probability {value.logprob}"
            return f"{value.token_id} {value.text!r}{logprob}"
    return repr(value)


def _tokens(number: int) -> str:
    return "1 token" if number == 1 else f"{number} tokens"


def _error(error: Failure | None) -> str:
    return "none" if error is None else f"{error.code} ({error.message})".replace("\n", "\\n")
