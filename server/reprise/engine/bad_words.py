"""Byte strings that generated text must never contain, whatever tokens would spell them."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
States = NDArray[np.unsignedinteger[Any]]

KEPT_BYTES = 64 << 20
"""Of automata that no sequence uses any more: of the words that one request may bring, an automaton takes 8 MiB."""
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

    @property
    def num_bytes(self) -> int:
        """What it takes, with the tokens that it has found forbidden."""
        return self._next.nbytes + sum(found.nbytes for found in self._cache.values())

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


class AutomatonCache:
    """Automata by their words: each is shared while it is used, and kept for those that come later.

    What is kept takes `max_bytes` at most once nobody uses it, the least recently used gone first. What is used is in
    memory anyway, so it is shared whether it is kept or not.
    """

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._alive: WeakValueDictionary[tuple[bytes, ...], BadWordAutomaton] = WeakValueDictionary()
        self._kept: OrderedDict[BadWordAutomaton, int] = OrderedDict()
        self._num_bytes = 0

    def get(self, words: tuple[bytes, ...]) -> BadWordAutomaton:
        """To be handed to `keep` when it is not used any more. Raises ValueError where a word is empty."""
        found = self._alive.get(words)
        if found is None:
            found = self._alive[words] = BadWordAutomaton(words)
        return found

    def keep(self, automaton: BadWordAutomaton) -> None:
        """Somebody has used it for the last time: it is as large as it has become."""
        self._num_bytes -= self._kept.pop(automaton, 0)
        self._kept[automaton] = automaton.num_bytes
        self._num_bytes += self._kept[automaton]
        while self._num_bytes > self._max_bytes:
            _, num_bytes = self._kept.popitem(last=False)
            self._num_bytes -= num_bytes


def _transitions(words: Sequence[bytes]) -> States:
    """[num_states, 256] the next state for each state and byte. State 0 is the start, the last one absorbs.

    In the smallest integers that there are for so many states.
    """
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
    table: States = np.zeros((dead + 1, 256), np.min_scalar_type(dead))
    fallback = [0] * dead
    queue = deque([0])
    while queue:
        node = queue.popleft()
        if node:
            table[node] = table[fallback[node]]
        for byte, child in children[node].items():
            behind = int(table[node, byte])
            if complete[child] or behind == dead:
                table[node, byte] = dead  # and there is no way to what lies behind
                continue
            fallback[child] = behind
            table[node, byte] = child
            queue.append(child)
    table[dead] = dead
    return table
