"""Mixtures of experts, registered as an experts function of transformers.

How many rows an expert gets follows the company of a token, and a float32 product's bits follow its number of rows.
Here each expert gets a multiple of ROW_MULTIPLE rows, and a token's experts are summed in the order in which the
router names them, in float32: so a row has the same bits whichever rows share its experts.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from reprise.engine.attention import ROW_MULTIPLE, num_rows_of_sequences

EXPERTS_NAME = "reprise_fixed_order"


def fixed_order_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The weighted sum of each token's experts.

    hidden_states: [tokens, hidden], top_k_index and top_k_weights: [tokens, k]. Returns [tokens, hidden]. Ids beyond
    the number of experts stand for none. Rows that fill up a step get zeros.
    """
    experts: Any = module  # transformers' decorator gives the layout: has_gate, has_bias, is_transposed, ...
    num_tokens, top_k = top_k_index.shape
    chosen = top_k_index[: num_rows_of_sequences(num_tokens)].reshape(-1)
    outputs = hidden_states.new_zeros((num_tokens * top_k, hidden_states.shape[-1]))
    for expert in sorted(set(chosen.tolist())):
        if expert >= experts.num_experts:
            continue
        places = (chosen == expert).nonzero()[:, 0]
        rows = F.pad(hidden_states[places // top_k], (0, 0, 0, -places.shape[0] % ROW_MULTIPLE))
        rows = _project(experts, "gate_up_proj" if experts.has_gate else "up_proj", expert, rows)
        rows = getattr(experts, "_apply_gate")(rows) if experts.has_gate else experts.act_fn(rows)  # noqa: B009 # its decorator's
        rows = _project(experts, "down_proj", expert, rows)
        if getattr(experts, "has_post_expert_norm", False):
            rows = experts.post_expert_norm(rows)
        outputs[places] = rows[: places.shape[0]].to(outputs.dtype)
    weighted = (outputs * top_k_weights.reshape(-1, 1)).float().reshape(num_tokens, top_k, -1)
    total = weighted[:, 0]
    for place in range(1, top_k):
        total = total + weighted[:, place]
    return total.to(hidden_states.dtype)


def _project(experts: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight: Tensor = getattr(experts, name)[expert]
    projected = F.linear(rows.to(weight.dtype), weight.T if experts.is_transposed else weight)
    return projected + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else projected


ExpertsInterface.register(EXPERTS_NAME, fixed_order_experts)
