from __future__ import annotations

from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st

from reprise.text.stop import StopMatcher, _borders
from reprise.types import StopStrings

# two letters and a wide character: borders, overlaps and repeats in every other example
alphabet = "ab好"
texts = st.text(alphabet, max_size=30)
stop_strings = st.lists(st.text(alphabet, min_size=1, max_size=5), max_size=4).map(tuple)


def naive(text: str, stops: tuple[str, ...], *, include: bool) -> tuple[str, str | None]:
    """The earliest end of any stop string; of those that end there the longest."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end if include else end - len(stop)], stop


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(edges)]


def run(pieces: list[str], stops: tuple[str, ...], *, include: bool = False) -> tuple[list[str], StopMatcher]:
    matcher = StopMatcher(StopStrings(stops, include_in_output=include))
    released = [matcher.feed(piece) for piece in pieces]
    if matcher.matched is None:
        released.append(matcher.flush())
    return released, matcher


@given(texts, stop_strings, st.lists(st.integers(0, 30), max_size=8), st.booleans())
def test_any_split_equals_a_naive_search_of_the_whole(
    text: str, stops: tuple[str, ...], places: list[int], include: bool
) -> None:
    released, matcher = run(cut(text, places), stops, include=include)
    expected, matched = naive(text, stops, include=include)
    assert "".join(released) == expected
    assert matcher.matched == matched
    assert matcher.num_released == len(expected)


@given(texts, stop_strings, st.lists(st.integers(0, 30), max_size=8))
def test_nothing_is_released_that_may_become_a_stop_string(
    text: str, stops: tuple[str, ...], places: list[int]
) -> None:
    matcher = StopMatcher(StopStrings(stops))
    seen, released = "", ""
    for piece in cut(text, places):
        seen += piece
        released += matcher.feed(piece)
        if matcher.matched is not None:
            break
        held = seen[len(released) :]
        starts = [seen[k:] for k in range(len(seen)) if any(stop.startswith(seen[k:]) for stop in stops)]
        assert held == max(starts, key=len, default="")


def test_borders_of_every_short_string() -> None:
    for length in range(1, 10):
        for letters in product("ab", repeat=length):
            string = "".join(letters)
            expected = [
                max(k for k in range(end) if string[:k] == string[end - k : end]) for end in range(1, length + 1)
            ]
            assert _borders(string) == expected


def test_longest_of_the_strings_that_complete_together() -> None:
    released, matcher = run(list("one abc"), ("bc", "abc", "c"))
    assert "".join(released) == "one "
    assert matcher.matched == "abc"


def test_earliest_completion_beats_earliest_start() -> None:
    released, matcher = run(["xabcd"], ("abcd", "bc"))
    assert "".join(released) == "xa"
    assert matcher.matched == "bc"


def test_text_after_the_match_is_dropped() -> None:
    matcher = StopMatcher(StopStrings(("END",)))
    assert matcher.feed("a END b") == "a "
    assert matcher.feed("more") == ""
    assert matcher.flush() == ""


def test_included_stop_string_is_released_whole() -> None:
    released, _ = run(["a E", "N", "D b"], ("END",), include=True)
    assert "".join(released) == "a END"


def test_disabled_completion_is_text_but_later_ones_may_start_in_it() -> None:
    matcher = StopMatcher(StopStrings(("aba",)))
    assert matcher.feed("aba", enabled=False) == "ab"
    assert matcher.feed("ba") == ""
    assert matcher.matched == "aba"


def test_without_stop_strings_text_passes() -> None:
    released, matcher = run(["a", "b"], ("",))
    assert released == ["a", "b", ""]
    assert matcher.matched is None
