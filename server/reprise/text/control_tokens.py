"""Control tokens that somebody merely writes about: text in a chat that spells `<|end|>` must not become it.

A chat template renders messages and control tokens into one string that is tokenised afterwards, so that the
difference is lost. Here the control tokens inside the messages are marked before rendering; after tokenising,
control tokens that came out of a marked place are replaced by the tokens that spell them as plain text.

Special tokens alone are treated so. Added tokens that are not special (`<think>`, `<tool_call>`) are text
that models write and get back, and stay tokens. A template that puts a control token together from pieces of
a message (`'<|' + role + '|>'`) defeats this; roles are a closed set at the API.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from reprise.errors import InvalidRequestError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

_START, _END = "\ufdd0", "\ufdd1"  # noncharacters: Unicode reserves them for use inside a program
_LONE = re.compile(r"(?<=ufdd0)\\{1,16}ufdd1")
"""The mark that `mark` puts behind what a text writes itself, as Python and JSON write it."""
_ESCAPED = re.compile(r"(?<!\\)\\{1,16}ufdd0((?:(?!\\{1,16}ufdd).){1,256}?)\\{1,16}ufdd1", re.DOTALL)
"""Both marks as Python and JSON write them, around something."""

Span = tuple[int, int]


class ControlTokens:
    """Finds, marks and disarms the control tokens of one tokenizer."""

    def __init__(self, added: Mapping[int, AddedToken], backend: Backend | None, unknown_token_id: int | None) -> None:
        """`backend`: None for a tokenizer written in Python, which does not say where its tokens come from."""
        special = {i: token for i, token in added.items() if token.special}
        self._backend = backend
        self._ids = frozenset(special) - {unknown_token_id}
        contents = sorted((token.content for token in special.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, contents)) or "(?!)")
        self._any_normalized = any(token.normalized for token in special.values())
        self._plain: Backend | None = None
        self._lock = threading.Lock()

    def mark(self, value: Any) -> Any:
        """A copy of strings, lists and mappings, keys included, each control token between two marks.

        Marks that are in a text already do no harm: they vanish before. One that it writes as an escape has a lone mark
        behind it, so that it is not taken for ours.
        """
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def encode(self, marked: str, encode: Callable[[str], list[int]]) -> list[int]:
        """The ids of a rendered chat in which marked control tokens are plain text.

        `encode` is the tokenizer's own, for a chat without them. Raises InvalidRequestError where the tokenizer
        cannot tell control tokens from text that spells them.
        """
        text, spans = _unmark(self._with_marks(marked), self._is_token)
        if not spans:
            return encode(text)
        if self._backend is None:
            raise InvalidRequestError(
                "The messages spell one of the model's control tokens, which this model's tokenizer cannot read as "
                "text. Write it differently.",
                param="messages",
            )
        encoding = self._backend.encode_batch([text], add_special_tokens=False)[0]
        plain: dict[str, list[int]] = {}
        ids: list[int] = []
        nearest = 0
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            while nearest < len(spans) and spans[nearest][1] <= start:
                nearest += 1
            if token_id in self._ids and nearest < len(spans) and spans[nearest][0] < end:
                written = text[start:end]
                if written not in plain:
                    plain[written] = self._encode_plainly(self._backend, written)
                ids += plain[written]
            else:
                ids.append(token_id)
        return ids

    def _with_marks(self, rendered: str) -> str:
        """The marks again where a template wrote out a list or mapping, in whose spelling they are escaped.

        Nobody else has them around a control token: what a message writes of that kind is kept apart by `mark`.
        """
        if "ufdd0" not in rendered:
            return rendered

        def restored(found: re.Match[str]) -> str:
            text = found[1]
            return f"{_START}{text}{_END}" if self._find(text) == [(0, len(text))] else found[0]

        return _LONE.sub("", _ESCAPED.sub(restored, rendered))

    def _mark_text(self, text: str) -> str:
        text = text.replace(_START, "").replace(_END, "")
        pieces = []
        last = 0
        for start, end in self._find(text):
            pieces += [text[last:start], _START, text[start:end], _END]
            last = end
        return "".join([*pieces, text[last:]]).replace("ufdd0", f"ufdd0{_END}")

    def _is_token(self, text: str) -> bool:
        return self._any_normalized or self._pattern.fullmatch(text) is not None

    def _find(self, text: str) -> list[Span]:
        if self._backend is None or not self._any_normalized:
            return [found.span() for found in self._pattern.finditer(text)]
        # normalisation may fold other characters into a control token's: let the backend look
        encoding = self._backend.encode_batch([text], add_special_tokens=False)[0]
        return [span for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i in self._ids]

    def _encode_plainly(self, backend: Backend, text: str) -> list[int]:
        with self._lock:
            if self._plain is None:
                self._plain = _without_special_tokens(backend)
            plain = self._plain
        ids = plain.encode(text, add_special_tokens=False).ids
        if not self._ids.isdisjoint(ids):
            # the model's own vocabulary merges the text into the control token's piece
            ids = [i for character in text for i in plain.encode(character, add_special_tokens=False).ids]
        return [i for i in ids if i not in self._ids]


def _without_special_tokens(backend: Backend) -> Backend:
    """A copy that reads special tokens as text: the original is shared between threads and must not change."""
    parse: Callable[[str], Backend] = type(backend).from_str
    plain = parse(backend.to_str())
    plain.encode_special_tokens = True
    return plain


def _unmark(marked: str, is_token: Callable[[str], bool]) -> tuple[str, list[Span]]:
    """The text without marks, and the spans of it that no control token may touch, in order.

    A template may cut or delete text between marks (`split`, `replace`). A mark that does not enclose a token
    with its neighbour is an empty span: no control token may form across it.
    """
    pieces = re.split(f"([{_START}{_END}])", marked)  # text, mark, text, mark, …, text
    spans: list[Span] = []
    position = 0
    for n in range(1, len(pieces), 2):
        start, position = position, position + len(pieces[n - 1])
        closes = n > 1 and pieces[n - 2] == _START and pieces[n] == _END
        whole = closes and is_token(pieces[n - 1])
        spans.append((start if whole else position, position))
    return "".join(pieces[::2]), spans
