"""The equivalence gate: at every load, does our way of running the model give the model's own logits?

Two ragged prompts are run through the paged runner in chunks and decode steps, and through the model's own eager
forward. A model that fails belongs to the padded tier; it is never served with a silently wrong answer.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from reprise.engine.alone_runner import AloneRunner
from reprise.engine.attention import ATTENTION_NAME
from reprise.engine.experts import EXPERTS_NAME
from reprise.engine.kv_cache import KVCache, LayerShape
from reprise.engine.memory import free_memory
from reprise.engine.model_runner import ModelRunner, PagedRunner
from reprise.engine.padded_runner import PaddedRunner
from reprise.engine.reference import (
    DIFFERENCE,
    STEP_BLOCK_SIZE,
    TOLERANCE,
    difference_of,
    eager_logits,
    gate_prompts,
    in_steps,
    layer_mismatch,
    unsupported_layers,
)


@dataclass(frozen=True, slots=True)
class GateResult:
    """What the gate found. `shapes` are the attention layers of a model that passed for the paged tier."""

    passed: bool
    reason: str
    shapes: dict[nn.Module, LayerShape]


def paged_gate(model: PreTrainedModel, *, fixed_order: bool = True) -> GateResult:
    """Try the paged tier. On success the model is left with our attention and (with `fixed_order`) experts functions,
    else with its own.
    """
    own_experts = getattr(model.config, "_experts_implementation")  # noqa: B009 # there is no public name
    shapes, reason = _compare(model, fixed_order=fixed_order)
    if reason.startswith(DIFFERENCE) and model.dtype not in TOLERANCE and _float32_copy_fits(model):
        # In low precision rounding alone may exceed the tolerance: the same weights in float32 decide.
        copy: PreTrainedModel = deepcopy(model).to(torch.float32)  # type: ignore[arg-type]  # a decorated method
        copy.set_attn_implementation("eager")
        copy.set_experts_implementation(own_experts)
        reason = _compare(copy, fixed_order=fixed_order)[1]
    if reason:
        model.set_attn_implementation("eager")
        model.set_experts_implementation(own_experts)
        return GateResult(passed=False, reason=reason, shapes={})
    return GateResult(passed=True, reason=equal_over(shapes), shapes=shapes)


def equal_over(shapes: dict[nn.Module, LayerShape]) -> str:
    """What the gate says of a model that passed with these layers."""
    return f"packed logits equal the model's own over {len(shapes)} layers"


def _compare(model: PreTrainedModel, *, fixed_order: bool) -> tuple[dict[nn.Module, LayerShape], str]:
    """The attention layers that came to us, and why the model cannot be run packed: empty where it can."""
    config = model.config.get_text_config()
    reason = unsupported_layers(config)
    if reason:
        return {}, reason
    prompts = gate_prompts(config)
    try:
        expected = [eager_logits(model, prompt) for prompt in prompts]
        model.set_attn_implementation(ATTENTION_NAME)
        if fixed_order:
            model.set_experts_implementation(EXPERTS_NAME)
        cache = KVCache(2 * (max(map(len, prompts)) + STEP_BLOCK_SIZE), model.device)
        runner = PagedRunner(model, cache, STEP_BLOCK_SIZE, fixed_order=fixed_order)
        actual = in_steps(runner, prompts)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 # whatever a model's code raises: it cannot be run in this way
        return {}, f"its forward pass cannot run packed ({type(error).__name__}: {_first_line(error)})"
    mismatch = layer_mismatch(config, list(runner.last_calls.values()), cache.shapes)
    return cache.shapes, mismatch or difference_of(expected, actual, model.dtype)


def _float32_copy_fits(model: PreTrainedModel) -> bool:
    """Whether a copy of the weights, four bytes each, takes less than half of the free memory."""
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    return 2 * needed < free_memory(model.device)


def padding_gate(model: PreTrainedModel, *, padding_is_inert: bool = True) -> GateResult:
    """Whether the padded tier gives the model's own logits, with left padding or (False) without."""
    runner = PaddedRunner(model, max_padded_tokens=1 << 30, padding_is_inert=padding_is_inert)
    return _token_by_token(model, runner, "left padding leaves the logits alone")


def alone_gate(model: PreTrainedModel) -> GateResult:
    """Whether the padded tier gives the model's own logits where each sequence is computed by itself."""
    return _token_by_token(model, AloneRunner(model), "token by token its logits are its own")


def _token_by_token(model: PreTrainedModel, runner: ModelRunner, found: str) -> GateResult:
    prompts = gate_prompts(model.config.get_text_config())
    expected = [eager_logits(model, prompt) for prompt in prompts]
    try:
        reason = difference_of(expected, in_steps(runner, prompts, chunked=False), model.dtype)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 # as above
        reason = f"its forward pass cannot run padded ({type(error).__name__}: {_first_line(error)})"
    return GateResult(passed=not reason, reason=reason or found, shapes={})


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
