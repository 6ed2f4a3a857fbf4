"""A transformers model of the Llama family as the native decoder sees it: packed weights, own keys and values.

The decoder keeps the residual stream and every sum in float32 and rounds to the weights' type only what goes into a
matrix product, so in bfloat16 it is nearer to the model in float32 than the model's own forward is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reprise.engine import llama_family
from reprise.engine.memory import Arena, MappedFiles, zeros
from reprise.engine.native.library import (
    FORMATS,
    Decoder,
    LayerWeights,
    Matrix,
    NativeContext,
    Step,
    built_variants,
    check_outcome,
)

BLOCK = 16
PANEL = 32
GROUP = 16
MAX_HEAD_DIM = 256
MAX_QUERY_GROUP = 48
_MULTIPLE = 16
_INT4_MULTIPLE = 32

Quantization = Literal["none", "int8", "int4"]
"""What weights are rounded to: eight bits with a scale for each output, or four with one for each 32 inputs."""


def unsupported(model: PreTrainedModel, quantize: Quantization = "none") -> str:
    """Why the native decoder cannot run this model; empty where it can."""
    if not built_variants():
        return "the native decoder was not built for this CPU"
    config: Any = model.config
    if difference := llama_family.differs(model):
        return f"the native decoder has no {difference}"
    if model.device.type != "cpu" or model.dtype not in (torch.bfloat16, torch.float32):
        return f"the native decoder does not run in {str(model.dtype).removeprefix('torch.')} on {model.device.type}"
    parts: Any = model.model
    attention = parts.layers[0].self_attn
    sizes = (config.hidden_size, config.intermediate_size, attention.head_dim)
    if any(size % _MULTIPLE for size in sizes) or attention.head_dim > MAX_HEAD_DIM:
        return f"the native decoder takes sizes that are multiples of {_MULTIPLE}, not {sizes}"
    if quantize == "int4" and any(
        size % _INT4_MULTIPLE
        for size in (config.hidden_size, config.intermediate_size, attention.head_dim * config.num_attention_heads)
    ):
        return f"int4 takes sizes that are multiples of {_INT4_MULTIPLE}, not {sizes}"
    if config.num_attention_heads > MAX_QUERY_GROUP * config.num_key_value_heads:
        return "the native decoder has no query groups of that size"
    return ""


class NativeDecoder:
    """The weights of a model, packed, with keys and values for `num_blocks` blocks of BLOCK tokens.

    `windows`: the sliding window of each layer, None for everything. `quantize`: what weights are rounded to; the
    embeddings and the output matrix to no less than eight bits. `release`: give up each weight of the model as soon as
    it is packed, so that the memory holds one copy; the model is of no use after that.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Sequence[int | None],
        *,
        num_blocks: int,
        max_positions: int,
        context: NativeContext,
        quantize: Quantization = "none",
        release: bool = False,
    ) -> None:
        self._context = context
        self._quantize: Quantization = quantize
        self._files = MappedFiles() if release else None
        self._dtype = model.dtype
        self._element_size = model.dtype.itemsize
        self._kept: list[Tensor] = []
        config: Any = model.config
        parts: Any = model.model
        head_dim: int = parts.layers[0].self_attn.head_dim
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self.vocab_size: int = head.weight.shape[0]
        num_embeddings: int = parts.embed_tokens.weight.shape[0]
        tied = head.weight.data_ptr() == parts.embed_tokens.weight.data_ptr()
        finest: Quantization = "none" if quantize == "none" else "int8"
        layers = (LayerWeights * len(parts.layers))()
        self._arena = Arena(
            sum(self._packed_bytes(weights, quantize) for layer in parts.layers for weights in _matrices(layer))
            + sum(self._packed_bytes([part.weight], finest) for part in [parts.embed_tokens] + [head] * (not tied))
        )
        size = num_blocks * BLOCK * config.num_key_value_heads * head_dim
        # One memory for all layers, of which a page is taken when its slots are first written, or by a `Reservation`.
        pool = torch.split(zeros(2 * size * len(layers), self._dtype), size)
        self.key_value_memory = pool
        for index, (layer, weights, window) in enumerate(zip(parts.layers, layers, windows, strict=True)):
            self._fill(layer, weights, window)
            weights.keys, weights.values = map(self._keep, pool[2 * index : 2 * index + 2])
        embedding = self._packed([parts.embed_tokens.weight], finest)
        positions = torch.arange(max_positions)[None]
        cosines, sines = parts.rotary_emb(torch.zeros(1), positions)
        self._decoder = Decoder(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            vocab=self.vocab_size,
            num_layers=len(parts.layers),
            num_embeddings=num_embeddings,
            num_positions=max_positions,
            num_blocks=num_blocks,
            epsilon=config.rms_norm_eps,
            scale=parts.layers[0].self_attn.scaling,
            layers=layers,
            embedding=embedding,
            output=embedding if tied else self._packed([head.weight], finest),
            final_norm=self._float32([parts.norm.weight]),
            cosines=self._float32([cosines[0, :, : head_dim // 2]]),
            sines=self._float32([sines[0, :, : head_dim // 2]]),
        )

    def forward(self, step: Step) -> None:
        """Compute a step. Releases the interpreter's lock; one step runs at a time.

        Raises MemoryError, and IndexError where a token id, a position or a block is none of this model's.
        """
        decoder, arguments = ctypes.byref(self._decoder), ctypes.byref(step)
        check_outcome(
            self._context.library.reprise_forward(self._context.handle, decoder, arguments, self._element_size)
        )

    def _fill(self, layer: Any, weights: LayerWeights, window: int | None) -> None:
        attention, quantize = layer.self_attn, self._quantize
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query_key_value, output, gate_up, down = _matrices(layer)
        weights.query_key_value = self._packed(query_key_value, quantize)
        weights.output = self._packed(output, quantize)
        weights.gate_up = self._packed(gate_up, quantize, interleaved=True)
        weights.down = self._packed(down, quantize)
        if projections[0].bias is not None:
            weights.query_key_value_bias = self._float32([projection.bias for projection in projections])
        weights.input_norm = self._float32([layer.input_layernorm.weight])
        weights.post_norm = self._float32([layer.post_attention_layernorm.weight])
        if hasattr(attention, "q_norm"):
            weights.query_norm = self._float32([attention.q_norm.weight])
            weights.key_norm = self._float32([attention.k_norm.weight])
        weights.window = window or 0

    def _packed(self, weights: Sequence[nn.Parameter], quantize: Quantization, *, interleaved: bool = False) -> Matrix:
        """Weights [rows, inner] as one, their rows one after the other or (of two) group by group."""
        library, code = self._context.library, FORMATS[quantize]
        inner = weights[0].shape[1]
        columns = sum(weight.shape[0] for weight in weights)
        data = self._arena.take(self._packed_bytes(weights, quantize)).data_ptr()
        scales = self._keep(torch.zeros(-(-columns // PANEL) * PANEL)) if quantize == "int8" else None
        first = 0
        for index, weight in enumerate(weights):
            rows = weight.detach().contiguous()
            place = (0, GROUP, index * GROUP) if interleaved else (first, 0, 0)
            check_outcome(
                library.reprise_pack(
                    *(self._context.handle, rows.data_ptr(), rows.shape[0], inner, data),
                    *(*place, scales, code, self._element_size),
                )
            )
            first += rows.shape[0]
            if self._files is not None:
                self._files.give_back(weight)
                weight.data = weight.data.new_empty(0)
        return Matrix(data, scales, code)

    def _packed_bytes(self, weights: Sequence[nn.Parameter], quantize: Quantization) -> int:
        columns, inner = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        library, code = self._context.library, FORMATS[quantize]
        return Arena.rounded(library.reprise_packed_bytes(columns, inner, code, self._element_size))

    def _float32(self, tensors: Iterable[Tensor]) -> int:
        return self._keep(torch.cat([tensor.detach().float() for tensor in tensors]).contiguous())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def _matrices(layer: Any) -> list[list[nn.Parameter]]:
    """A layer's weights in the order of their use, those together that are packed as one."""
    attention, mlp = layer.self_attn, layer.mlp
    together = (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
    return [[linear.weight for linear in linears] for linears in together]
