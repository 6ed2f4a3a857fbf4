from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reprise.text.detokenizer import Detokenizer
from reprise.text.tokenizer import Tokenizer
from reprise.text.vocabulary import Vocabulary

TEXTS = ["Stop here, 你好 🙂!", "👩🏽‍🚀 e\u0301 ä 🇩🇪", "  two  spaces\n\n\tand tabs ", "plain"]


def detokenize(tokenizer: Tokenizer, token_ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.feed(token_id) for token_id in token_ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    joined = "".join(detokenize(tokenizer, token_ids))
    decoded = tokenizer.decode(token_ids, skip_special_tokens=True)
    # what goes on from a prompt keeps the space that a whole text loses
    assert joined in {decoded, " " + decoded, decoded + " "}


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_has_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    for piece in detokenize(tokenizer, token_ids):
        assert "\ufffd" not in piece


@pytest.mark.parametrize("name", ["byte_level", "sentence_piece_bpe"])
def test_character_comes_with_the_token_that_completes_it(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    token_ids = tokenizer.encode("x\U0001f984", add_special_tokens=False)
    pieces = detokenize(tokenizer, token_ids)
    assert len(token_ids) >= 4
    assert [piece.strip() for piece in pieces if piece.strip()] == ["x", "\U0001f984"]
    assert pieces[-2:] == ["\U0001f984", ""]


def test_combining_mark_is_a_character_of_its_own(byte_tokenizer: Tokenizer) -> None:
    pieces = detokenize(byte_tokenizer, byte_tokenizer.encode("e\u0323", add_special_tokens=False))
    assert "".join(pieces) == "e\u0323"
    assert pieces[0] == "e"
    assert unicodedata.combining("\u0323")


@settings(deadline=None)
@given(data=st.data())
def test_any_ids_give_their_bytes_decoded_at_once(tokenizers: dict[str, Tokenizer], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["byte_level", "sentence_piece_bpe", "unigram", "characters"]))
    skip = data.draw(st.booleans())
    vocabulary = tokenizers[name].vocabulary
    token_ids = data.draw(st.lists(st.integers(0, vocabulary.size + 3), max_size=30))
    spelled = [i for i in token_ids if not (skip and i in vocabulary.special_token_ids)]
    expected = b"".join(vocabulary.data(i) for i in spelled).decode(errors="replace")
    assert "".join(detokenize(tokenizers[name], token_ids, skip=skip)) == expected


def test_unfinished_character_is_replaced_at_the_end(byte_tokenizer: Tokenizer) -> None:
    token_ids = byte_tokenizer.encode("\U0001f984", add_special_tokens=False)[:-1]
    pieces = detokenize(byte_tokenizer, token_ids)
    assert pieces[-1] == "\ufffd"
    assert set(pieces[:-1]) == {""}


def test_invalid_byte_is_replaced_as_soon_as_it_is_certain(byte_tokenizer: Tokenizer) -> None:
    first = byte_tokenizer.encode("\U0001f984", add_special_tokens=False)[0]
    letter = byte_tokenizer.encode("x", add_special_tokens=False)[0]
    assert detokenize(byte_tokenizer, [first, letter]) == ["", "\ufffdx", ""]


def test_special_tokens_show_only_where_asked(tokenizer: Tokenizer) -> None:
    end = tokenizer.end_token_ids[0]
    assert "".join(detokenize(tokenizer, [end])) == ""
    assert "".join(detokenize(tokenizer, [end], skip=False)).strip() == "<|im_end|>"


def test_special_token_in_the_middle_of_a_character(byte_tokenizer: Tokenizer) -> None:
    first, *rest = byte_tokenizer.encode("\U0001f984", add_special_tokens=False)
    token_ids = [first, byte_tokenizer.end_token_ids[0], *rest]
    assert "".join(detokenize(byte_tokenizer, token_ids)) == "\U0001f984"
    assert "".join(detokenize(byte_tokenizer, token_ids, skip=False)).startswith("\ufffd<|im_end|>\ufffd")


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_window_decoding_equals_the_tokenizer_on_words(tokenizers: dict[str, Tokenizer], data: st.DataObject) -> None:
    tokenizer = tokenizers["word_piece"]
    assert not tokenizer.vocabulary.exact
    words = data.draw(st.lists(st.sampled_from(["the", "fox", "jumps", "你", "!", ",", "lazy", "dog"]), max_size=40))
    token_ids = tokenizer.encode(" ".join(words), add_special_tokens=False)
    expected = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert "".join(detokenize(tokenizer, token_ids)) == expected


class _Undecodable:
    """A tokenizer of unknown spelling whose every id is an invalid byte."""

    vocabulary = Vocabulary([], [], exact=False)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "\ufffd" * len(token_ids)


def test_window_gives_up_on_a_character_that_never_ends() -> None:
    tokenizer: Any = _Undecodable()
    pieces = detokenize(tokenizer, [0] * 20)
    assert "".join(pieces) == "\ufffd" * 20
    assert [n for n, piece in enumerate(pieces) if piece] == [7, 15, 20]


def test_window_stays_short(tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizers["word_piece"]
    lengths: list[int] = []
    decode = tokenizer.decode

    def measured(token_ids: list[int], *, skip_special_tokens: bool) -> str:
        lengths.append(len(token_ids))
        return decode(token_ids, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", measured)
    detokenize(tokenizer, tokenizer.encode("the fox " * 100, add_special_tokens=False))
    assert max(lengths) <= 16
