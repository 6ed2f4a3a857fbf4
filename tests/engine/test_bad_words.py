from __future__ import annotations

from weakref import ref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprise.engine.bad_words import AutomatonCache, BadWordAutomaton, TokenTable

# few letters: words overlap, contain and border on each other
letters = st.sampled_from([b"a", b"b", b"\xe4"])
words = st.lists(st.lists(letters, min_size=1, max_size=5).map(b"".join), max_size=5)
texts = st.lists(letters, max_size=8).map(b"".join)
vocabularies = st.lists(texts, min_size=1, max_size=20)


@given(words, st.lists(st.integers(0, 19), max_size=12), vocabularies)
def test_forbidden_tokens_are_those_that_would_complete_a_word(
    words: list[bytes], choices: list[int], vocabulary: list[bytes]
) -> None:
    automaton, table = BadWordAutomaton(words), TokenTable(vocabulary)
    text, state = b"", automaton.start
    for choice in choices:
        expected = [any(word in text + token for word in words) for token in vocabulary]
        assert automaton.forbidden(state, table).tolist() == expected
        token = vocabulary[choice % len(vocabulary)]
        if any(word in text + token for word in words):
            continue
        text += token
        state = automaton.advance(state, token)
        assert state != automaton.dead


@given(words, texts, texts)
def test_state_does_not_depend_on_how_the_text_was_split(words: list[bytes], first: bytes, second: bytes) -> None:
    automaton = BadWordAutomaton(words)
    split = automaton.advance(automaton.advance(automaton.start, first), second)
    assert split == automaton.advance(automaton.start, first + second)
    assert (split == automaton.dead) == any(word in first + second for word in words)


def test_word_inside_a_longer_one_is_found_on_the_way() -> None:
    automaton = BadWordAutomaton([b"xaby", b"ab", b"b"])
    assert automaton.advance(automaton.start, b"xa") != automaton.dead
    assert automaton.advance(automaton.start, b"xab") == automaton.dead
    longer_first = BadWordAutomaton([b"abcd", b"bc"])
    assert longer_first.advance(longer_first.start, b"abc") == longer_first.dead


def test_word_without_space_is_banned_with_and_without_one() -> None:
    table = TokenTable([b"cat", b" cat", b"con", b"cat", b"e"])
    automaton = BadWordAutomaton([b"cat"])
    assert automaton.forbidden(automaton.start, table).tolist() == [True, True, False, True, False]
    only_spaced = BadWordAutomaton([b" cat"])
    assert only_spaced.forbidden(only_spaced.start, table).tolist() == [False, True, False, False, False]


def test_character_split_over_byte_tokens() -> None:
    word = "坏".encode()
    table = TokenTable([word[:1], word[1:2], word[2:], b"x"])
    automaton = BadWordAutomaton([word])
    state = automaton.advance(automaton.start, word[:2])
    assert automaton.forbidden(state, table).tolist() == [False, False, True, False]


def test_rows_beyond_the_vocabulary_spell_nothing() -> None:
    table = TokenTable([b"a"], vocab_size=4)
    automaton = BadWordAutomaton([b"a"])
    assert automaton.forbidden(automaton.start, table).tolist() == [True, False, False, False]
    assert table.token_bytes[3] == b""


def test_one_very_long_token_costs_its_own_length_alone() -> None:
    table = TokenTable([b"a"] * 1000 + [b"b" * 10_000])
    assert sum(column.nbytes for column in table.columns) == 11_000


def test_cache_is_bounded_and_follows_the_table() -> None:
    automaton = BadWordAutomaton([b"a" * 100])
    table = TokenTable([b"a", b"b"])
    for state in range(100):
        automaton.forbidden(state, table)
    assert len(automaton._cache) <= 32
    other = TokenTable([b"a" * 100])
    assert np.array_equal(automaton.forbidden(automaton.start, other), [True])


def test_empty_word_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        BadWordAutomaton([b"a", b""])


def test_automata_of_any_size_tell_their_states_apart() -> None:
    """Numbers of states beside those that the next larger integer is needed for."""
    for length in (253, 254, 255, 256, 65_534, 65_535):
        automaton = BadWordAutomaton([b"a" * length])
        assert automaton.advance(automaton.start, b"a" * (length - 1)) == length - 1
        assert automaton.advance(length - 1, b"b") == automaton.start
        assert automaton.advance(length - 1, b"ab") == automaton.dead


def test_automaton_of_all_the_words_of_a_request_is_small() -> None:
    assert BadWordAutomaton([bytes([letter]) * 128 for letter in range(128)]).num_bytes <= 9 << 20


def test_automaton_is_shared_while_it_is_used_and_kept_for_those_that_come_later() -> None:
    cache = AutomatonCache(max_bytes=1 << 20)
    first, second = cache.get((b"a",)), cache.get((b"a",))
    assert first is second
    assert cache.get((b"b",)) is not first
    held = ref(first)
    cache.keep(first)
    del first, second
    assert cache.get((b"a",)) is held()


def test_kept_automata_are_bounded_by_bytes_and_the_least_recently_used_go_first() -> None:
    words = [(bytes([letter]) * 100,) for letter in range(10)]
    size = BadWordAutomaton(words[0]).num_bytes
    cache = AutomatonCache(max_bytes=3 * size)
    held = []
    for each in words:
        automaton = cache.get(each)
        held.append(ref(automaton))
        cache.keep(automaton)
        del automaton
    assert [automaton() is not None for automaton in held] == [False] * 7 + [True] * 3
    again = cache.get(words[7])
    cache.keep(again)
    del again
    cache.keep(cache.get(words[0]))
    assert [held[7]() is not None, held[8]() is not None, held[9]() is not None] == [True, False, True]


def test_what_kept_automata_have_found_counts_as_well() -> None:
    table = TokenTable([b"a"] * 10_000)
    automaton = BadWordAutomaton([b"ab"])
    alone = automaton.num_bytes
    automaton.forbidden(0, table)
    automaton.forbidden(1, table)
    assert automaton.num_bytes == alone + 20_000
    cache = AutomatonCache(max_bytes=20_000)
    kept = cache.get((b"ab",))
    held = ref(kept)
    cache.keep(kept)
    kept.forbidden(0, table)
    kept.forbidden(1, table)
    cache.keep(kept)
    del kept
    assert held() is None


def test_automata_that_are_used_are_shared_beyond_the_bound() -> None:
    cache = AutomatonCache(max_bytes=0)
    used = cache.get((b"a",))
    cache.keep(used)
    assert cache.get((b"a",)) is used
    held = ref(used)
    del used
    assert held() is None
