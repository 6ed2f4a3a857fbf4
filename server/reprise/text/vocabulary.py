"""What each token id spells, as bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from reprise.text.spelling import Speller

Encode = Callable[[str], list[int]]
Decode = Callable[[Sequence[int]], str]
"""Ids to text, special tokens left out."""

_SAMPLE_TEXTS = (
    "The quick brown fox, 12345 times; isn't it?  Two spaces,\ttab,\n\nnew lines.",
    "def f(x):\n    return x ** 2  # ½ of π ≈ 1.57",
    "你好，世界。今天天气很好！繁體字「龘」",
    "Привет, мир! Γειά σου. שלום, مرحبا بالعالم",
    "こんにちは 안녕하세요 สวัสดี नमस्ते",
    "🙂👩🏽‍🚀🇩🇪 e\u0301a\u0308 ﷽ \U00020000",
)
_NUM_SAMPLED_IDS = 4096


class Vocabulary:
    """What each token id spells.

    `exact`: the concatenated bytes of the non-special ids are the text, up to a space at the very start or
    end that the tokenizer's decoder would take away. Generated text goes on from a prompt, so that space is
    text: nothing is ever stripped.
    """

    def __init__(self, data: Sequence[bytes], special_token_ids: Collection[int], *, exact: bool) -> None:
        self._data = list(data)
        self._texts: dict[int, str | None] = {}
        self.special_token_ids = frozenset(special_token_ids)
        self.exact = exact

    @property
    def size(self) -> int:
        """Ids are below this; the model's output matrix may have more rows, which spell nothing."""
        return len(self._data)

    def data(self, token_id: int) -> bytes:
        """The raw bytes of an id, perhaps part of a character; a special token's are those of its literal text."""
        return self._data[token_id] if 0 <= token_id < len(self._data) else b""

    def text(self, token_id: int) -> str | None:
        """What an id spells, where that is whole characters by itself; else None."""
        try:
            return self._texts[token_id]
        except KeyError:
            data = self.data(token_id)
            self._texts[token_id] = text = data.decode() if _is_text(data) else None
            return text

    def token_bytes(self) -> list[bytes] | None:
        """What each id adds to the text: special tokens nothing. None where that is not known exactly."""
        if not self.exact:
            return None
        return [b"" if i in self.special_token_ids else data for i, data in enumerate(self._data)]


def build_vocabulary(
    pieces: Sequence[str | None],
    added: Mapping[int, str],
    special_token_ids: Collection[int],
    spellers: Sequence[Speller],
    encode: Encode,
    decode: Decode,
) -> Vocabulary:
    """The vocabulary of the first speller whose bytes agree with `decode`, or an inexact one.

    pieces: the tokenizer's own spelling of each id, None for gaps. added: the contents of tokens that were
    added to the model's vocabulary, special ones among them.
    """
    for speller in spellers:
        data, literal = _spell_all(pieces, added, special_token_ids, speller)
        checked = [i for i in range(len(data)) if i not in special_token_ids and i not in literal and data[i]]
        if _agrees_with_decoder(data, checked, special_token_ids, encode, decode):
            return Vocabulary(data, special_token_ids, exact=True)
    data = [b"" if piece is None else decode([i]).encode(errors="replace") for i, piece in enumerate(pieces)]
    for token_id, content in added.items():
        data[token_id] = content.encode(errors="replace")
    return Vocabulary(data, special_token_ids, exact=False)


def _spell_all(
    pieces: Sequence[str | None],
    added: Mapping[int, str],
    special_token_ids: Collection[int],
    speller: Speller,
) -> tuple[list[bytes], set[int]]:
    """Bytes by id, and the ids of added tokens that spell their content literally.

    Decoders see added tokens as pieces, which suits those that repeat a piece (runs of `▁`). An added token
    that a byte-level decoder would garble (`é` is no UTF-8 in its alphabet) is meant as it is written.
    """
    data = [b"" if piece is None else speller.spell(piece) for piece in pieces]
    literal = set()
    for token_id, content in added.items():
        if token_id in special_token_ids or (speller.byte_level and not _is_text(data[token_id])):
            data[token_id] = content.encode(errors="replace")
            literal.add(token_id)
    return data, literal


def _agrees_with_decoder(
    data: Sequence[bytes],
    checked: Sequence[int],
    special_token_ids: Collection[int],
    encode: Encode,
    decode: Decode,
) -> bool:
    """Compare bytes and decoder on sampled ids, alone and in a row, and on text in several scripts."""
    stride = max(1, len(checked) // _NUM_SAMPLED_IDS)
    whole = [i for i in checked[::stride] if _is_text(data[i])]
    rows = [[i] for i in whole]
    rows += [[whole[(7919 * n + 31 * k) % len(whole)] for k in range(8)] for n in range(min(256, len(whole)))]
    rows += [encode(text) for text in _SAMPLE_TEXTS]
    for row in rows:
        spelled = b"".join(data[i] for i in row if i not in special_token_ids)
        if _is_text(spelled) and not _same_text(spelled.decode(), decode(row)):
            return False
    return bool(whole)


def _same_text(spelled: str, decoded: str) -> bool:
    return decoded in {spelled, spelled.removeprefix(" "), spelled.removesuffix(" ")}


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
