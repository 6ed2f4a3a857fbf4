"""A sequence: one choice of one request, with its ids and counters. It owns its own arithmetic."""

from __future__ import annotations

from enum import Enum, auto

from reprise.engine.block_pool import ROOT_DIGEST, block_digest
from reprise.types import SamplingParams, TokenLogprobs


class SequenceStatus(Enum):
    """Prefill and decode are no statuses: both are `num_computed_tokens` catching up with `num_tokens`."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """Token ids so far, how many of them are in the KV cache, and where.

    A *pass* brings `num_computed_tokens` up to `num_tokens` and then gives one new token. With the cache a pass
    after the prompt is one token long; with `use_cache=False` every pass starts from nothing.
    """

    def __init__(
        self,
        sequence_id: int,
        *,
        choice_index: int,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        output_token_ids: list[int] | None = None,
        prediction_token_ids: list[int] | None = None,
        arrival: int = 0,
    ) -> None:
        self.sequence_id = sequence_id
        self.choice_index = choice_index
        self.sampling = sampling
        self.num_prompt_tokens = len(prompt_token_ids)
        self.token_ids = [*prompt_token_ids, *(output_token_ids or [])]
        self.prediction_token_ids = prediction_token_ids or []
        """What its output may be, for guesses alone."""
        self.arrival = arrival
        self.turn = arrival
        self.status = SequenceStatus.WAITING
        self.num_computed_tokens = 0
        self.block_ids: list[int] = []
        self.max_chunk: int | None = None
        """Tokens that one step may compute of it at most, where more of them ran out of memory."""
        self.num_found_tokens = 0
        """Tokens that it found in the prefix cache when it was last admitted."""
        self.computes_all = False
        """Whether it finds nothing in the prefix cache and leaves nothing there: what it found gave no numbers."""
        self.num_cached_tokens: int | None = None
        self.reported = False
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if sampling.num_prompt_logprobs is not None and not output_token_ids:
            self.prompt_logprobs = [None] * self.num_prompt_tokens
        self.num_kept_drafts = 0
        """Tokens of the last step's draft that were kept: they were computed with it."""
        self.draft_failed = False
        """Whether a step with a draft failed: then it has none any more, since its answer may not depend on them."""
        self._digests: list[bytes] = []

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own log-probabilities are still to be had from this pass."""
        return self.prompt_logprobs is not None and self.num_output_tokens == 0

    @property
    def uses_prefix_cache(self) -> bool:
        return self.sampling.use_cache and not self.computes_all

    @property
    def is_constrained(self) -> bool:
        """Whether the next token's scores follow from other tokens, or masks, beside the logits."""
        sampling = self.sampling
        return bool(
            sampling.presence_penalty
            or sampling.frequency_penalty
            or sampling.repetition_penalty != 1.0
            or sampling.allowed_token_ids is not None
            or sampling.logit_bias
            or sampling.bad_words
            or self.num_output_tokens < sampling.min_tokens
        )

    @property
    def takes_drafts(self) -> bool:
        """Whether several of its next tokens can be chosen in one step."""
        return self.sampling.use_cache and not self.is_constrained and not self.scores_prompt and not self.draft_failed

    def digest(self, block_index: int, block_size: int) -> bytes:
        """The digest of a whole block of this sequence. Tokens are only ever appended, so it never changes."""
        while len(self._digests) <= block_index:
            index = len(self._digests)
            parent = self._digests[-1] if self._digests else ROOT_DIGEST
            tokens = self.token_ids[index * block_size : (index + 1) * block_size]
            assert len(tokens) == block_size
            self._digests.append(block_digest(parent, tokens))
        return self._digests[block_index]
