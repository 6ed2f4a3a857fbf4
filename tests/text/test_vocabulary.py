from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

import reprise.text.vocabulary
from reprise.text.spelling import byte_level_alphabet, candidate_spellers, speller_for
from reprise.text.tokenizer import Tokenizer


def wrap(backend: Backend) -> Tokenizer:
    wrapper: Any = PreTrainedTokenizerFast  # transformers' constructor has no annotations
    return Tokenizer(wrapper(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>"))


def fresh(tokenizer: Tokenizer) -> Backend:
    assert tokenizer._backend is not None
    return Backend.from_str(tokenizer._backend.to_str())


@pytest.mark.parametrize("name", ["byte_level", "sentence_piece_bpe", "unigram", "characters", "word_suffix"])
def test_kinds_whose_bytes_are_known_exactly(tokenizers: dict[str, Tokenizer], name: str) -> None:
    vocabulary = tokenizers[name].vocabulary
    assert vocabulary.exact
    token_bytes = vocabulary.token_bytes()
    assert token_bytes is not None
    assert len(token_bytes) == vocabulary.size
    for token_id in vocabulary.special_token_ids:
        assert token_bytes[token_id] == b""
    ordinary = next(i for i in range(vocabulary.size) if token_bytes[i])
    assert token_bytes[ordinary] == vocabulary.data(ordinary)


def test_pieces_that_depend_on_their_neighbours_are_not_exact(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["word_piece"]
    assert not tokenizer.vocabulary.exact
    assert tokenizer.vocabulary.token_bytes() is None
    (word,) = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.vocabulary.data(word) == b"the"


def test_special_tokens_spell_their_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocabulary.data(tokenizer.end_token_ids[0]) == b"<|im_end|>"
    assert tokenizer.end_token_ids[0] in tokenizer.vocabulary.special_token_ids


def test_ids_outside_the_vocabulary_spell_nothing(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.vocabulary.data(byte_tokenizer.vocabulary.size) == b""
    assert byte_tokenizer.vocabulary.data(-1) == b""


def test_byte_fallback_pieces_are_single_bytes(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentence_piece_bpe"]
    token_ids = tokenizer.encode("\U0001f984", add_special_tokens=False)
    data = [tokenizer.vocabulary.data(i) for i in token_ids]
    assert b"".join(data).lstrip() == "\U0001f984".encode()
    assert data[-1] == b"\x84"


def test_added_token_is_spelled_as_written_where_the_decoder_would_garble_it(
    byte_tokenizer: Tokenizer,
) -> None:
    backend = fresh(byte_tokenizer)
    backend.add_tokens([AddedToken("é"), AddedToken("<tool call>"), AddedToken("plain")])
    tokenizer = wrap(backend)
    assert tokenizer.vocabulary.exact
    for text in ("é", "<tool call>", "plain"):
        (token_id,) = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.vocabulary.data(token_id) == text.encode()
        assert token_id not in tokenizer.vocabulary.special_token_ids


def test_added_token_that_repeats_a_piece_is_decoded_as_one(tokenizers: dict[str, Tokenizer]) -> None:
    backend = fresh(tokenizers["sentence_piece_bpe"])
    backend.add_tokens([AddedToken("▁▁▁", normalized=False)])
    tokenizer = wrap(backend)
    assert tokenizer.vocabulary.exact
    token_id = backend.token_to_id("▁▁▁")
    assert token_id is not None
    assert tokenizer.vocabulary.data(token_id) == b"   "


def test_gaps_between_ids_spell_nothing(byte_tokenizer: Tokenizer) -> None:
    description = json.loads(fresh(byte_tokenizer).to_str())
    vocab = description["model"]["vocab"]
    last = max(vocab.values())
    merged = next(piece for piece, i in vocab.items() if i == last)
    description["model"]["vocab"][merged] = last + 3
    tokenizer = wrap(Backend.from_str(json.dumps(description)))
    assert tokenizer.vocabulary.exact
    assert tokenizer.vocabulary.size == last + 4
    assert tokenizer.vocabulary.data(last + 1) == b""


def test_without_a_decoder_pieces_are_joined_by_spaces(tokenizers: dict[str, Tokenizer]) -> None:
    backend = fresh(tokenizers["characters"])
    backend.decoder = None
    tokenizer = wrap(backend)
    (token_id,) = tokenizer.encode("T", add_special_tokens=False)
    assert tokenizer.vocabulary.exact
    assert tokenizer.vocabulary.data(token_id) == b" T"
    assert tokenizer.decode([token_id, token_id], skip_special_tokens=True) == "T T"


def test_unknown_decoder_is_left_to_the_tokenizer(tokenizers: dict[str, Tokenizer]) -> None:
    backend = fresh(tokenizers["characters"])
    backend.decoder = decoders.CTC()
    tokenizer = wrap(backend)
    assert not tokenizer.vocabulary.exact
    token_ids = tokenizer.encode("aab", add_special_tokens=False)
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "ab"
    assert tokenizer.vocabulary.data(token_ids[0]) == b"a"


def test_disagreement_with_the_decoder_makes_it_inexact(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reprise.text.vocabulary, "_same_text", lambda spelled, decoded: spelled == decoded.upper())
    assert not wrap(fresh(byte_tokenizer)).vocabulary.exact


def test_byte_level_alphabet_names_every_byte_once() -> None:
    alphabet = byte_level_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert len(alphabet) == 256
    assert alphabet["Ġ"] == 0x20
    assert alphabet["Ċ"] == 0x0A


@pytest.mark.parametrize(
    ("decoder", "piece", "expected"),
    [
        ({"type": "ByteLevel"}, "ä½łĠ", "你 ".encode()),
        ({"type": "ByteLevel"}, "a b", b"a b"),
        ({"type": "Metaspace", "replacement": "▁"}, "▁a▁", b" a "),
        ({"type": "BPEDecoder", "suffix": "</w>"}, "a</w>", b"a "),
        ({"type": "WordPiece", "prefix": "##"}, "##a", b"a"),
        ({"type": "WordPiece", "prefix": "##"}, "a", b" a"),
        ({"type": "Strip", "content": "_", "start": 1, "stop": 2}, "__a___", b"_a_"),
        ({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}, "<0xE4>", b"\xe4"),
        (
            {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "<0xE4>>",
            b"<0xE4>>",
        ),
    ],
)
def test_steps(decoder: dict[str, object], piece: str, expected: bytes) -> None:
    speller = speller_for(decoder)
    assert speller is not None
    assert speller.spell(piece) == expected


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "CTC"},
        {"type": "Replace", "pattern": {"Regex": "▁+"}, "content": " "},
        {
            "type": "Sequence",
            "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": "a", "start": 1, "stop": 1}],
        },
    ],
)
def test_decoders_whose_pieces_have_no_bytes_of_their_own(decoder: dict[str, object]) -> None:
    assert speller_for(decoder) is None


def test_candidates_for_undescribed_tokenizers_read_their_own_pieces() -> None:
    pieces = [("Ġa", b" a"), ("▁a", b" a"), ("a</w>", b"a "), ("a", b"a")]
    for speller, (piece, expected) in zip(candidate_spellers(), pieces, strict=True):
        assert speller.spell(piece) == expected
