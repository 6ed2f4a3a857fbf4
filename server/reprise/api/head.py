"""What every chunk of a response says alike, and the sums over its choices."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from reprise.alignment import Alignment
from reprise.protocol.responses import CompletionTokensDetails, PromptTokensDetails, RepriseExtension, Usage
from reprise.types import ChoiceDelta


class ResponseHead(msgspec.Struct, frozen=True, kw_only=True):
    """Identity of one response; `created` in seconds since 1970."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    extension: RepriseExtension
    num_prompt_tokens: tuple[int, ...]
    """Of each prompt."""
    num_choices: int
    """Of each prompt."""


class UsageCount:
    """Counts tokens while deltas pass. A prompt counts once, however many choices it has; a prediction in each one."""

    def __init__(self, head: ResponseHead, prediction_token_ids: Sequence[int] = ()) -> None:
        self._num_prompt_tokens = sum(head.num_prompt_tokens)
        self._num_choices = head.num_choices
        self._num_generated = 0
        self._num_cached: dict[int, int] = {}
        self._alignments: dict[int, Alignment] = {}
        if prediction_token_ids:
            self._alignments = {index: Alignment(prediction_token_ids) for index in range(head.num_choices)}

    def add(self, delta: ChoiceDelta) -> None:
        self._num_generated += len(delta.token_ids)
        if self._alignments:
            for token_id in delta.token_ids:
                self._alignments[delta.index].push(token_id)
        if delta.index % self._num_choices == 0:
            # Further choices of a prompt may reuse what the first one computed: that saves the client
            # nothing.
            self._num_cached[delta.index] = delta.num_cached_tokens

    def usage(self) -> Usage:
        return Usage(
            self._num_prompt_tokens,
            self._num_generated,
            self._num_prompt_tokens + self._num_generated,
            PromptTokensDetails(sum(self._num_cached.values())),
            CompletionTokensDetails(
                accepted_prediction_tokens=sum(alignment.num_accepted for alignment in self._alignments.values()),
                rejected_prediction_tokens=sum(alignment.num_rejected for alignment in self._alignments.values()),
            ),
        )
