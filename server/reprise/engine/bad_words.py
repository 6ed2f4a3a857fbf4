"""Byte strings that generated text must never contain, whatever tokens would spell them."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]

_MAX_CACHED_STATES = 32


class TokenTable:
    """The bytes of every token, laid out for walking all of them at once.

    `order` are the ids from the longest token to the shortest; `columns[j]` is byte j of those that have one,
    in that order. Nothing is padded: the table is as large as the vocabulary's text.
    """

    def __init__(self, token_bytes: Sequence[bytes], vocab_size: int | None = None) -> None:
        """vocab_size: rows of the output matrix where it has more of them; what is beyond spells nothing."""
        padding = max(0, (vocab_size or 0) - len(token_bytes))
        self.token_bytes: list[bytes] = [*token_bytes, *[b""] * padding]
        lengths = np.fromiter((len(data) for data in self.token_bytes), np.int64, len(self.token_bytes))
        self.order: NDArray[np.int64] = np.argsort(-lengths, kind="stable")
        text = np.frombuffer(b"".join(self.token_bytes), np.uint8)
        starts = (np.cumsum(lengths) - lengths)[self.order]
        num_longer = np.cumsum(np.bincount(lengths)[::-1])[::-1]  # [j]: tokens with at least j bytes
        self.columns: list[NDArray[np.uint8]] = [
            text[starts[: num_longer[j + 1]] + j] for j in range(len(num_longer) - 1)
        ]


class BadWordAutomaton:
    """An Aho-Corasick automaton over bytes. States are ints; once a word is complete, the state stays `dead`."""

    start = 0

    def __init__(self, words: Sequence[bytes]) -> None:
        if not all(words):
            raise ValueError("A bad word must have at least one byte.")
        self._next = _transitions(words)
        self.dead = len(self._next) - 1
        self._cache: OrderedDict[int, BoolArray] = OrderedDict()
        self._cached_table: TokenTable | None = None

    def advance(self, state: int, data: bytes) -> int:
        """The state after `data`."""
        for byte in data:
            state = int(self._next[state, byte])
        return state

    def forbidden(self, state: int, table: TokenTable) -> BoolArray:
        """[vocab] True for the tokens whose bytes complete a word. The array is shared: do not change it."""
        if table is not self._cached_table:
            self._cache.clear()
            self._cached_table = table
        found = self._cache.get(state)
        if found is None:
            found = self._cache[state] = self._walk(state, table)
            if len(self._cache) > _MAX_CACHED_STATES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(state)
        return found

    def _walk(self, state: int, table: TokenTable) -> BoolArray:
        flat = self._next.reshape(-1)
        states = np.full(len(table.order), state, np.int64)
        for column in table.columns:
            walking = states[: len(column)]
            walking *= 256
            walking += column
            walking[:] = flat[walking]
        forbidden = np.empty(len(states), np.bool_)
        forbidden[table.order] = states == self.dead
        return forbidden


def _transitions(words: Sequence[bytes]) -> NDArray[np.int32]:
    """[num_states, 256] the next state for each state and byte. State 0 is the start, the last one absorbs."""
    children: list[dict[int, int]] = [{}]
    complete = [False]
    for word in words:
        node = 0
        for byte in word:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                complete.append(False)
            node = children[node][byte]
        complete[node] = True

    dead = len(children)
    table = np.zeros((dead + 1, 256), np.int32)
    fallback = [0] * dead
    queue = deque([0])
    while queue:
        node = queue.popleft()
        if node:
            table[node] = table[fallback[node]]
            complete[node] |= complete[fallback[node]]
        for byte, child in children[node].items():
            fallback[child] = int(table[node, byte])
            table[node, byte] = child
            queue.append(child)
    table[dead] = dead
    renamed = np.arange(dead + 1, dtype=np.int32)
    renamed[np.flatnonzero(complete)] = dead
    return renamed[table]
