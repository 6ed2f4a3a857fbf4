"""Two runs of one response, compared bit by bit. Pure: values in, values out."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import msgspec

from reprise.replay.bundle import Choice, Generation, Logprob, Logprobs

CONTEXT_CHARACTERS = 80
"""Of the text before a difference, and of a differing text from there on."""
_CONTEXT_TOKENS = 64

Spell = Callable[[int], bytes]
"""What a token id spells."""
Run = TypeVar("Run", str, list[int], list["_Row"])
Kind = Literal[
    "prompt_logprob", "prompt_top_logprob", "logprob", "top_logprob", "token", "text", "finish_reason", "stop_reason"
]

_KINDS: tuple[Kind, Kind] = ("logprob", "top_logprob")
_PROMPT_KINDS: tuple[Kind, Kind] = ("prompt_logprob", "prompt_top_logprob")
_Row = list[tuple[int, Logprob | None]]
"""Log-probabilities at a position: the chosen token's first, then those of the most likely ones."""


class Token(msgspec.Struct, frozen=True):
    """A token in its place; `logprob` where the request asked for it."""

    token_id: int
    text: str
    logprob: Logprob | None = None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The first place where two runs of a choice differ in one respect."""

    kind: Kind
    position: int
    """Of the token among the generated ones (`prompt_*`: among the prompt's); of the character for a text."""
    expected: Token | str | int | None
    """What the bundle has; None where it has nothing there."""
    found: Token | str | int | None
    before: str
    """The end of the text before."""
    logprob_gap: float | None = None
    """A token: how much likelier the expected one was than the found one, by the bundle's log-probabilities, else by
    those found; None where neither has both. A log-probability: the found one minus the expected one."""


class ChoiceReport(msgspec.Struct, frozen=True, kw_only=True):
    """What comparing one choice gave."""

    index: int
    """In the response."""
    identical: bool
    num_tokens: int
    """Generated tokens that are the same, from the first on."""
    complete: bool
    """Whether the choice was compared to its end. If not, the bundle or the other run has but a beginning of it."""
    differences: list[Difference]
    """The first of each kind, those of the prompt first."""


def compare_generations(
    expected: Sequence[Generation], found: Sequence[Generation], *, spell: Spell, cut_off: bool = False
) -> list[ChoiceReport]:
    """The reports on all choices of a response; both are runs of the same requests. cut_off: as in compare_choices."""
    reports: list[ChoiceReport] = []
    for generation, again in zip(expected, found, strict=True):
        prompt = generation.request.prompt_token_ids
        for choice, other in zip(generation.choices, again.choices, strict=True):
            report = compare_choices(choice, other, prompt, index=len(reports), spell=spell, cut_off=cut_off)
            reports.append(report)
    return reports


def compare_choices(
    expected: Choice,
    found: Choice,
    prompt_token_ids: Sequence[int],
    *,
    index: int,
    spell: Spell,
    cut_off: bool = False,
) -> ChoiceReport:
    """Compare what was recorded of a choice with what another run gave.

    Where the record stops before the choice's end, the other run may go on. cut_off: something ended the other run at
    no place of its own, so where it stops before the choice's end, the record may go on. Log-probabilities are compared
    up to the first token that differs; the text and the reasons only where no token does.
    """
    whole = _Whole(expected.finish_reason is not None, found.finish_reason is not None or not cut_off)
    prompt = list(prompt_token_ids)
    ids, other_ids = whole.compared(expected.token_ids, found.token_ids)
    at = first_difference(ids, other_ids)
    rows, other_rows = _rows(expected.logprobs, ids), _rows(found.logprobs, other_ids)
    place = _Place(prompt, ids, spell)
    differences: list[Difference | None] = []
    if (whole.expected or expected.prompt_logprobs is not None) and (whole.found or found.prompt_logprobs is not None):
        prompt_rows = _rows(expected.prompt_logprobs, prompt), _rows(found.prompt_logprobs, prompt)
        differences.append(_logprob_difference(*prompt_rows, _Place([], prompt, spell), _PROMPT_KINDS))
    if at is None:
        differences.append(_logprob_difference(*whole.compared(rows, other_rows), place, _KINDS))
        differences += _end_differences(expected, found, place, whole)
    else:
        num_compared = min(at, len(rows), len(other_rows))
        known = rows[:num_compared], other_rows[:num_compared]
        differences.append(_logprob_difference(*known, place, _KINDS))
        differences.append(_token_difference(at, (ids, other_ids), (rows, other_rows), place))
    told = [difference for difference in differences if difference is not None]
    return ChoiceReport(
        index=index,
        identical=not told,
        num_tokens=len(ids) if at is None else at,
        complete=whole.both,
        differences=told,
    )


def first_difference(expected: Sequence[object], found: Sequence[object]) -> int | None:
    """The first index at which one has what the other has not; None where they are equal."""
    for index, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            return index
    return None if len(expected) == len(found) else min(len(expected), len(found))


def _rows(logprobs: Logprobs | None, token_ids: Sequence[int]) -> list[_Row]:
    """token_ids: the chosen ones. Entries beyond them, as only an edited bundle has, are left out."""
    if logprobs is None:
        return []
    columns = zip(token_ids, logprobs.chosen, logprobs.top_token_ids, logprobs.top_logprobs, strict=False)
    return [[(token_id, chosen), *zip(ids, tops, strict=True)] for token_id, chosen, ids, tops in columns]


def _bits(row: _Row) -> list[tuple[int, object]]:
    """Equal where all bits are: 0.0 and -0.0 differ, and a NaN is itself."""
    return [(i, struct.pack("<d", value) if isinstance(value, float) else value) for i, value in row]


def _logprob_difference(
    expected: Sequence[_Row], found: Sequence[_Row], place: _Place, kinds: tuple[Kind, Kind]
) -> Difference | None:
    """The first bits that differ. kinds: for the chosen token's, and for an alternative's."""
    at = first_difference([_bits(row) for row in expected], [_bits(row) for row in found])
    if at is None:
        return None
    row, other = (rows[at] if at < len(rows) else [] for rows in (expected, found))
    rank = first_difference(_bits(row), _bits(other)) or 0
    one, two = (place.token(*entries[rank]) if rank < len(entries) else None for entries in (row, other))
    same_token = one is not None and two is not None and one.token_id == two.token_id
    return Difference(
        kind=kinds[rank > 0],
        position=at,
        expected=one,
        found=two,
        before=place.before(at),
        logprob_gap=_minus(two.logprob, one.logprob) if same_token and one and two else None,
    )


def _token_difference(
    at: int, ids: tuple[Sequence[int], Sequence[int]], rows: tuple[Sequence[_Row], Sequence[_Row]], place: _Place
) -> Difference:
    one, other = (run[at] if at < len(run) else None for run in ids)
    entries = [dict(reversed(run[at])) if at < len(run) else {} for run in rows]
    gap = None
    if one is not None and other is not None:
        gaps = (_minus(known.get(one), known.get(other)) for known in entries)
        gap = next((gap for gap in gaps if gap is not None), None)
    return Difference(
        kind="token",
        position=at,
        expected=None if one is None else place.token(one, entries[0].get(one)),
        found=None if other is None else place.token(other, entries[1].get(other)),
        before=place.before(at),
        logprob_gap=gap,
    )


def _end_differences(expected: Choice, found: Choice, place: _Place, whole: _Whole) -> list[Difference]:
    """Of text and reasons, where all tokens are the same."""
    text, other = whole.compared(expected.text, found.text)
    at = first_difference(text, other)
    differences = []
    if at is not None:
        shown, found_there = (run[at : at + CONTEXT_CHARACTERS] for run in (text, other))
        before = text[max(0, at - CONTEXT_CHARACTERS) : at]
        differences.append(Difference(kind="text", position=at, expected=shown, found=found_there, before=before))
    reasons: tuple[tuple[Kind, str | int | None, str | int | None], ...] = (
        ("finish_reason", expected.finish_reason, found.finish_reason),
        ("stop_reason", expected.stop_reason, found.stop_reason),
    )
    end = len(expected.token_ids)
    for kind, reason, other_reason in reasons if whole.both else ():
        if reason != other_reason:
            before = place.before(end)
            difference = Difference(kind=kind, position=end, expected=reason, found=other_reason, before=before)
            differences.append(difference)
    return differences


def _minus(one: Logprob | None, other: Logprob | None) -> float | None:
    return one - other if isinstance(one, float) and isinstance(other, float) else None


class _Whole(msgspec.Struct, frozen=True):
    """Which of two runs of a choice is known to its end; the other may go on where it stops."""

    expected: bool
    found: bool

    @property
    def both(self) -> bool:
        return self.expected and self.found

    def compared(self, expected: Run, found: Run) -> tuple[Run, Run]:
        """What of both is to be equal."""
        num_expected, num_found = len(expected), len(found)
        return (
            expected if self.found else expected[:num_found],
            found if self.expected else found[:num_expected],
        )


class _Place(msgspec.Struct, frozen=True):
    """Where a difference is: after `start`, among `token_ids`."""

    start: list[int]
    token_ids: list[int]
    spell: Spell

    def token(self, token_id: int, logprob: Logprob | None) -> Token:
        return Token(token_id, self._text([token_id]), logprob)

    def before(self, position: int) -> str:
        return self._text([*self.start, *self.token_ids[:position]][-_CONTEXT_TOKENS:])[-CONTEXT_CHARACTERS:]

    def _text(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self.spell, token_ids)).decode(errors="replace")
