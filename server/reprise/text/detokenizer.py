"""Token ids to text, one id at a time, in whole characters."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reprise.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Incremental decoder of one choice's ids.

    The pieces that `feed` and `flush` return concatenate to the text of all ids, however they are split.
    Where the vocabulary is exact, that text is its bytes decoded at once, every maximal invalid part one
    U+FFFD, and the first token keeps its leading space, since generated text goes on from a prompt. Other
    vocabularies are decoded by the tokenizer itself over a short window.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._silent_token_ids = tokenizer.vocabulary.special_token_ids if skip_special_tokens else frozenset()
        self._decoder: _ByteDecoder | _WindowDecoder = (
            _ByteDecoder(tokenizer) if tokenizer.vocabulary.exact else _WindowDecoder(tokenizer)
        )

    @property
    def has_pending(self) -> bool:
        """Whether ids were fed whose text is not out yet: it starts with the next character that comes out."""
        return self._decoder.has_pending

    def spells_nothing(self, token_id: int) -> bool:
        return token_id in self._silent_token_ids

    def feed(self, token_id: int) -> str:
        """The characters that this id completes, perhaps none."""
        return "" if token_id in self._silent_token_ids else self._decoder.feed(token_id)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character."""
        return self._decoder.flush()


class _ByteDecoder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._vocabulary = tokenizer.vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.has_pending = False

    def feed(self, token_id: int) -> str:
        if not self.has_pending and (text := self._vocabulary.text(token_id)) is not None:
            return text
        text = self._utf8.decode(self._vocabulary.data(token_id))
        self.has_pending = self._utf8.getstate()[0] != b""
        return text

    def flush(self) -> str:
        self.has_pending = False
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """Decodes the latest ids with and without the new ones; the difference is the new text.

    Ids whose text ends in U+FFFD wait for the rest of their character, `_MAX_PENDING` ids at most: no
    character has more bytes than four, so what is still unfinished then is really invalid.
    """

    _MAX_PENDING = 8

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    @property
    def has_pending(self) -> bool:
        return bool(self._pending)

    def feed(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._new_text()
        unfinished = not text or text.endswith(_REPLACEMENT)
        if unfinished and len(self._pending) < self._MAX_PENDING:
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        text = self._new_text() if self._pending else ""
        self._context, self._pending = self._pending, []
        return text

    def _new_text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
