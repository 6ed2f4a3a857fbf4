"""A transformers model of the Llama family as plain operations over pages of keys and values.

Nothing in a forward depends on a value: on CUDA it never waits for the device, and can be captured as a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel

from reprise.engine import elementwise, llama_family
from reprise.engine.cuda.attention import PagedAttention
from reprise.engine.cuda.products import Products
from reprise.engine.cuda.tables import StepTables

MAX_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 8


def unsupported(model: PreTrainedModel) -> str:
    """Why this decoder cannot run the model; empty where it can."""
    if difference := llama_family.differs(model):
        return f"the decoder for CUDA has no {difference}"
    if "num_splits" not in signature(varlen_attn).parameters:
        return f"torch {torch.__version__} cannot keep its attention to one order"
    if model.device.type == "cuda" and model.dtype not in (torch.bfloat16, torch.float16):
        return f"the decoder for CUDA does not run in {str(model.dtype).removeprefix('torch.')}"
    parts: Any = model.model
    attention = parts.layers[0].self_attn
    if attention.head_dim % _HEAD_DIM_MULTIPLE or attention.head_dim > MAX_HEAD_DIM:
        return f"the decoder for CUDA has no heads of {attention.head_dim}"
    return ""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Of one layer, all in the model's number format; a matrix is [outer, inner]."""

    query_key_value: Tensor
    query_key_value_bias: Tensor | None
    output: Tensor
    gate_up: Tensor
    down: Tensor
    input_norm: Tensor
    post_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    window: int | None


class FusedWeights:
    """A model's weights as the decoder reads them. The model shares their memory and can be run as before."""

    def __init__(self, model: PreTrainedModel, windows: Sequence[int | None]) -> None:
        """windows: the sliding window of each layer, None for everything."""
        parts: Any = model.model
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self.layers = [_layer(layer, window) for layer, window in zip(parts.layers, windows, strict=True)]
        self.embedding: Tensor = parts.embed_tokens.weight.detach()
        self.head: Tensor = head.weight.detach()
        self.final_norm: Tensor = parts.norm.weight.detach()

    @property
    def matrices(self) -> list[Tensor]:
        """Everything that rows are multiplied with."""
        of_layers = [m for w in self.layers for m in (w.query_key_value, w.output, w.gate_up, w.down)]
        return [*of_layers, self.head]


class CudaDecoder:
    """The model over `num_blocks` blocks of `block_size` tokens and one more, for rows that are nobody's.

    Keys and values: [layers, num_blocks + 1, block_size, 2 * kv_heads, head_dim] in the model's number format, the keys
    of a token before its values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: FusedWeights,
        products: Products,
        attention: PagedAttention,
        *,
        num_blocks: int,
        block_size: int,
        max_positions: int,
    ) -> None:
        config: Any = model.config
        first: Any = model.model.layers[0].self_attn
        self.device, self.products = model.device, products
        self.num_blocks, self.block_size, self.max_positions = num_blocks, block_size, max_positions
        self.num_embeddings, self.vocab_size = weights.embedding.shape[0], weights.head.shape[0]
        self._weights, self._attention = weights, attention
        self._num_heads: int = config.num_attention_heads
        self._num_kv_heads: int = config.num_key_value_heads
        self._head_dim: int = first.head_dim
        self._scale: float = first.scaling
        self._epsilon: float = config.rms_norm_eps
        # Torch's own on a CPU gives an element other bits at another place in a tensor.
        self._silu = F.silu if model.device.type == "cuda" else elementwise.silu
        self._cosines, self._sines = _rotations(model, max_positions)
        pages = (len(weights.layers), num_blocks + 1, block_size, 2 * self._num_kv_heads, self._head_dim)
        # Zeros, since a masked-out NaN left in fresh memory would still poison a weighted sum.
        self._pages = torch.zeros(pages, dtype=model.dtype, device=model.device)

    @torch.inference_mode()
    def forward(self, tables: StepTables, *, max_queries: int) -> Tensor:
        """Logits [L, vocab] in the model's number format, or with `max_queries` 1 of all rows [R, vocab].

        `max_queries`: rows of a sequence at most; with 1 each has one, and there are no others. What the tables name is
        not checked: token ids are below `num_embeddings`, positions below `max_positions`. Row counts are the products'
        buckets.
        """
        weights, products, epsilon = self._weights, self.products, self._epsilon
        hidden = F.embedding(tables.token_ids, weights.embedding)
        num_rows = hidden.shape[0]
        num_queries, num_turned = self._num_heads, self._num_heads + self._num_kv_heads
        slots = tables.slots.long()
        rotation = (
            self._cosines.index_select(0, tables.positions)[:, None],
            self._sines.index_select(0, tables.positions)[:, None],
        )
        for layer, pages in zip(weights.layers, self._pages, strict=True):
            projected = products(_norm(hidden, layer.input_norm, epsilon), layer.query_key_value)
            if layer.query_key_value_bias is not None:
                projected = projected + layer.query_key_value_bias
            # A row's queries, keys and values lie side by side, so that few and not many small kernels take them on.
            heads = projected.view(num_rows, -1, self._head_dim)
            turning = heads[:, :num_turned]
            if layer.query_norm is not None and layer.key_norm is not None:
                of_query, of_key = (
                    _norm(heads[:, :num_queries], layer.query_norm, epsilon),
                    heads[:, num_queries:num_turned],
                )
                turning = torch.cat((of_query, _norm(of_key, layer.key_norm, epsilon)), dim=1)
            _rotate(turning, *rotation, into=heads[:, :num_turned])
            pages.flatten(0, 1).index_copy_(0, slots, heads[:, num_queries:])
            attended = self._attention(
                heads[:, :num_queries],
                pages[:, :, : self._num_kv_heads],
                pages[:, :, self._num_kv_heads :],
                tables,
                scale=self._scale,
                window=layer.window,
                max_queries=max_queries,
            )
            hidden = hidden + products(attended.reshape(num_rows, -1), layer.output)
            gate, up = products(_norm(hidden, layer.post_norm, epsilon), layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + products(self._silu(gate) * up, layer.down)
        if max_queries > 1:
            hidden = hidden.index_select(0, tables.logit_rows)
        return products(_norm(hidden, weights.final_norm, epsilon), weights.head)


def _layer(layer: Any, window: int | None) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    biases = [projection.bias for projection in projections]
    has_norms = hasattr(attention, "q_norm")
    return LayerWeights(
        query_key_value=_fused([projection.weight for projection in projections]),
        query_key_value_bias=None if biases[0] is None else torch.cat(biases).detach(),
        output=attention.o_proj.weight.detach(),
        gate_up=_fused([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight.detach(),
        input_norm=layer.input_layernorm.weight.detach(),
        post_norm=layer.post_attention_layernorm.weight.detach(),
        query_norm=attention.q_norm.weight.detach() if has_norms else None,
        key_norm=attention.k_norm.weight.detach() if has_norms else None,
        window=window,
    )


def _fused(weights: list[nn.Parameter]) -> Tensor:
    """The rows of all of them in one matrix, of which each becomes a part: the memory holds one copy."""
    together = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, torch.split(together, [weight.shape[0] for weight in weights]), strict=True):
        weight.data = part
    return together


def _rotations(model: PreTrainedModel, max_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [max_positions, head_dim] float32 of the model's rotary embedding, as `_rotate` takes them."""
    parts: Any = model.model
    positions = torch.arange(max_positions, device=model.device)[None]
    cosines, sines = (part[0].float() for part in parts.rotary_emb(torch.zeros(1, device=model.device), positions))
    # The first half of a head is rotated by minus what the second half is.
    sines[:, : sines.shape[-1] // 2].neg_()
    return cosines.contiguous(), sines.contiguous()


def _rotate(heads: Tensor, cosines: Tensor, sines: Tensor, *, into: Tensor) -> None:
    """Rotate heads [R, heads, head_dim] into others, or themselves; cosines and sines are [R, 1, head_dim] float32."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((second, first), dim=-1)
    torch.add(heads * cosines, turned * sines, out=into)


def _norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(rows, (rows.shape[-1],), weight, epsilon)
