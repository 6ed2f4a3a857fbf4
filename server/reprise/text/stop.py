"""Stop strings over a stream of text."""

from __future__ import annotations

from reprise.types import StopStrings


class StopMatcher:
    """Ends a text at the first stop string that completes in it, and never releases a part of one.

    The earliest completion wins; of several strings that complete on the same character the longest, so that
    none of them shows. The released pieces are the text up to the match: without the string, or with it where
    `include_in_output` says so. At most the longest suffix that may still become a stop string is held back.
    """

    def __init__(self, stop: StopStrings) -> None:
        self._include = stop.include_in_output
        self._patterns = [_Pattern(string) for string in sorted(set(stop.strings), key=len, reverse=True) if string]
        self._held = ""
        self.matched: str | None = None
        self.num_released = 0
        """Characters released so far."""

    def feed(self, text: str, *, enabled: bool = True) -> str:
        """The text that is certainly output. Not `enabled`: a string that completes within `text` is no match.

        After a match everything fed is dropped.
        """
        if self.matched is not None:
            return ""
        if not self._patterns:
            return self._release(text)
        text, fresh = self._held + text, len(self._held)
        for end in range(fresh + 1, len(text) + 1):
            completed = [pattern for pattern in self._patterns if pattern.advance(text[end - 1])]
            if completed and enabled:
                self.matched = completed[0].string
                self._held = ""
                return self._release(text[: end if self._include else end - len(self.matched)])
        cut = len(text) - max(pattern.num_matched for pattern in self._patterns)
        self._held = text[cut:]
        return self._release(text[:cut])

    def flush(self) -> str:
        """What was held back, at the end of a text without a match."""
        held, self._held = self._held, ""
        return self._release(held)

    def _release(self, text: str) -> str:
        self.num_released += len(text)
        return text


class _Pattern:
    """One stop string as a Knuth-Morris-Pratt automaton; `num_matched` characters of it end the text so far."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.num_matched = 0
        self._borders = _borders(string)

    def advance(self, character: str) -> bool:
        """Take the next character; True when it completes the string."""
        while self.num_matched and self.string[self.num_matched] != character:
            self.num_matched = self._borders[self.num_matched - 1]
        if self.string[self.num_matched] == character:
            self.num_matched += 1
        if self.num_matched < len(self.string):
            return False
        self.num_matched = self._borders[-1]
        return True


def _borders(string: str) -> list[int]:
    """For each prefix the length of its longest proper border (prefix that is also a suffix)."""
    borders = [0] * len(string)
    length = 0
    for i in range(1, len(string)):
        while length and string[i] != string[length]:
            length = borders[length - 1]
        if string[i] == string[length]:
            length += 1
        borders[i] = length
    return borders
