"""The equivalence gate of the decoders that replace a model's own layers: the native one, and the one for CUDA."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reprise.engine.attention import ROW_MULTIPLE
from reprise.engine.cuda.attention import plain_attention
from reprise.engine.cuda.decoder import CudaDecoder, FusedWeights
from reprise.engine.cuda.products import Products, row_buckets
from reprise.engine.cuda.runner import CudaRunner
from reprise.engine.kv_cache import LayerShape
from reprise.engine.mapped_model import empty_model
from reprise.engine.model_runner import ModelRunner
from reprise.engine.native.decoder import BLOCK, NativeDecoder, Quantization
from reprise.engine.native.library import NativeContext
from reprise.engine.native.runner import NativeRunner
from reprise.engine.reference import (
    DIFFERENCE,
    difference_of,
    eager_logits,
    eager_logits_together,
    errors_of,
    gate_prompts,
    in_float32,
    in_steps,
    layer_mismatch,
    tolerance,
    unsupported_layers,
)

QUANTIZED_TOLERANCE: dict[Quantization, float] = {"int8": 0.15, "int4": 0.8}
"""Of the mean error of all layers: random weights, whose errors nothing corrects, are worse off than trained ones."""
NUM_GATE_LAYERS = 2
NUM_GATE_VOCABULARY = 1024


def native_layers_gate(model: PreTrainedModel, windows: list[int | None]) -> str:
    """Why the native decoder does not equal this model: empty where it does.

    Its first layers and tokens decide, in float32: rounding in a lower precision would hide a difference.
    """
    small, prompts = _first_layers(model), _first_tokens(model)
    decoder = NativeDecoder(
        small,
        windows[:NUM_GATE_LAYERS],
        num_blocks=2 * (-(-max(map(len, prompts)) // BLOCK)),
        max_positions=max(map(len, prompts)),
        context=NativeContext(torch.get_num_threads()),
    )
    difference = _runner_difference(small, NativeRunner(decoder, BLOCK), prompts)
    return f"in the native decoder {difference}" if difference else ""


def cuda_layers_gate(model: PreTrainedModel, windows: list[int | None]) -> str:
    """The same of the decoder for CUDA, with the attention that takes float32."""
    small, prompts = _first_layers(model), _first_tokens(model)
    longest = max(map(len, prompts))
    decoder = CudaDecoder(
        small,
        FusedWeights(small, windows[:NUM_GATE_LAYERS]),
        Products(row_buckets(ROW_MULTIPLE, len(prompts) * longest)),
        plain_attention,
        num_blocks=2 * (-(-longest // BLOCK)),
        block_size=BLOCK,
        max_positions=longest,
    )
    difference = _runner_difference(small, CudaRunner(decoder, 0), prompts)
    return f"in the decoder for CUDA {difference}" if difference else ""


def _first_tokens(model: PreTrainedModel) -> list[list[int]]:
    return [[token % NUM_GATE_VOCABULARY for token in prompt] for prompt in gate_prompts(model.config)]


def _runner_difference(small: PreTrainedModel, runner: ModelRunner, prompts: list[list[int]]) -> str:
    expected = [eager_logits(small, prompt) for prompt in prompts]
    return difference_of(expected, in_steps(runner, prompts, block_size=BLOCK), torch.float32)


def _first_layers(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float32 of the first NUM_GATE_LAYERS layers over the first NUM_GATE_VOCABULARY tokens."""
    config = deepcopy(model.config)
    config.num_hidden_layers = min(NUM_GATE_LAYERS, config.num_hidden_layers)
    config.vocab_size = min(NUM_GATE_VOCABULARY, config.vocab_size)
    config.pad_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    small: Any = empty_model(config, torch.float32)
    weights = model.state_dict()
    wanted = {name: weights[name][: empty.shape[0]].float() for name, empty in small.state_dict().items()}
    small.load_state_dict(wanted, assign=True)
    parts: Any = model.model
    small.model.rotary_emb = deepcopy(parts.rotary_emb)
    result: PreTrainedModel = small
    return result


class NativeGate:
    """A model's own logits and attention layers, taken while it has its weights, for what replaces it.

    Its own forward runs in float32: rounding is then what replaces it does alone, and not what both do.
    """

    def __init__(self, model: PreTrainedModel, quantize: Quantization = "none") -> None:
        self._dtype = model.dtype
        self._tolerance = QUANTIZED_TOLERANCE.get(quantize, tolerance(model.dtype))
        self._config = model.config
        self._prompts = gate_prompts(model.config)
        self._num_calls: dict[nn.Module, int] = {}
        self.shapes: dict[nn.Module, LayerShape] = {}
        model.set_attn_implementation("eager")
        with in_float32(model), self._seeing_attention(model):
            self._expected = eager_logits_together(model, self._prompts)
        self.num_positions = max(map(len, self._prompts))
        self.num_blocks = 2 * -(-self.num_positions // BLOCK)

    @property
    def windows(self) -> list[int | None]:
        """The sliding window of each layer, as the model's own forward names it."""
        return [shape.sliding_window for shape in self.shapes.values()]

    def mismatch(self) -> str:
        """Why the model's attention is not what its configuration tells; empty where it is."""
        num_calls = list(self._num_calls.values())
        return unsupported_layers(self._config) or layer_mismatch(self._config, num_calls, self.shapes)

    def difference(self, runner: ModelRunner, block_size: int = BLOCK) -> str:
        """How the runner's logits, of all layers, differ by more than rounding explains; empty where they do not."""
        actual = in_steps(runner, self._prompts, block_size=block_size)
        errors = torch.cat([errors_of(*pair) for pair in zip(self._expected, actual, strict=True)])
        mean = float(errors.nan_to_num(nan=float("inf")).mean())
        return f"{DIFFERENCE} by {mean:.2g} of their size" if mean > self._tolerance else ""

    @contextmanager
    def _seeing_attention(self, model: PreTrainedModel) -> Iterator[None]:
        """While it lasts, note what each layer hands to the eager attention of its model."""
        module: Any = sys.modules[type(model).__module__]
        own = module.eager_attention_forward

        def attend(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Any:
            window = named.get("sliding_window")
            self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3], self._dtype, window)
            self._num_calls[layer] = self._num_calls.get(layer, 0) + 1
            return own(layer, query, key, value, *others, **named)

        module.eager_attention_forward = attend
        try:
            yield
        finally:
            module.eager_attention_forward = own
