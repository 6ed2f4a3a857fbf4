"""What a model itself says: the judge of answers that came over HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class Reference:
    """transformers' own forward pass over whole sequences, without a cache."""

    def __init__(self, directory: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """[len(token_ids), vocab] float64: row i is what comes after token i."""
        output: Tensor = self._model(torch.tensor([list(token_ids)]), use_cache=False).logits
        return output[0].double()

    def next_probabilities(self, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
        """[len(output), vocab] the distribution that each output token was drawn from, before all parameters."""
        return self.logits([*prompt, *output])[len(prompt) - 1 : -1].softmax(-1)

    def greedy(
        self,
        prompt: Sequence[int],
        num_tokens: int,
        *,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        allowed_token_ids: Collection[int] | None = None,
        masked_token_ids: Collection[int] = (),
    ) -> list[int]:
        """The ids that these penalties and masks, written down from their definitions, lead to."""
        output: list[int] = []
        for _ in range(num_tokens):
            scores = self.logits([*prompt, *output])[-1]
            seen = list({*prompt, *output})
            penalised = scores[seen]
            scores[seen] = torch.where(penalised > 0, penalised / repetition_penalty, penalised * repetition_penalty)
            for token_id, count in Counter(output).items():
                scores[token_id] -= presence_penalty + frequency_penalty * count
            for token_id, bias in (logit_bias or {}).items():
                scores[token_id] += bias
            scores[list(masked_token_ids)] = -torch.inf
            if allowed_token_ids is not None:
                mask = torch.full_like(scores, -torch.inf)
                mask[list(allowed_token_ids)] = 0.0
                scores = scores + mask
            output.append(int(scores.argmax()))
        return output
