"""Guesses from the text that a request predicts for its answer."""

from __future__ import annotations

from collections.abc import Mapping

from reprise.alignment import Alignment
from reprise.engine.drafter import Draft
from reprise.engine.sequence import Sequence


class Prediction:
    """Implements `drafter.Guesser`. Where an answer stands in its prediction is derived from its tokens alone."""

    cost = 0.0

    def __init__(self) -> None:
        self._alignments: dict[Sequence, tuple[Alignment, int]] = {}
        """Of each sequence, with the number of its output tokens that were taken in."""

    def knows(self, sequence: Sequence) -> bool:
        return bool(sequence.prediction_token_ids)

    def guess(self, lengths: Mapping[Sequence, int]) -> dict[Sequence, Draft]:
        return {
            sequence: draft
            for sequence, length in lengths.items()
            if sequence.prediction_token_ids and (draft := self._aligned(sequence).next_token_ids(length))
        }

    def forget(self, sequence: Sequence) -> None:
        self._alignments.pop(sequence, None)

    def _aligned(self, sequence: Sequence) -> Alignment:
        found = self._alignments.get(sequence)
        alignment, num_taken = found or (Alignment(sequence.prediction_token_ids), 0)
        for token_id in sequence.token_ids[sequence.num_prompt_tokens + num_taken :]:
            alignment.push(token_id)
        self._alignments[sequence] = alignment, sequence.num_output_tokens
        return alignment
