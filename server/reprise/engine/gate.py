"""The equivalence gate: at every load, does our way of running the model give the model's own logits?

Two ragged prompts are run through the paged runner in chunks and decode steps, and through the model's own eager
forward. A model that fails belongs to the padded tier; it is never served with a silently wrong answer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from reprise.engine.alone_runner import AloneRunner
from reprise.engine.attention import ATTENTION_NAME, ROW_MULTIPLE
from reprise.engine.cuda.attention import plain_attention
from reprise.engine.cuda.decoder import CudaDecoder, FusedWeights
from reprise.engine.cuda.products import Products, row_buckets
from reprise.engine.cuda.runner import CudaRunner
from reprise.engine.experts import EXPERTS_NAME
from reprise.engine.kv_cache import KVCache, LayerShape
from reprise.engine.mapped_model import empty_model
from reprise.engine.memory import free_memory
from reprise.engine.model_runner import ModelRunner, PagedRunner
from reprise.engine.native.decoder import BLOCK, NativeDecoder, Quantization
from reprise.engine.native.library import NativeContext
from reprise.engine.native.runner import NativeRunner
from reprise.engine.padded_runner import PaddedRunner
from reprise.engine.scheduler import ScheduledSequence
from reprise.engine.sequence import Sequence, SequenceStatus
from reprise.types import SamplingParams

TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 0.08
QUANTIZED_TOLERANCE: dict[Quantization, float] = {"int8": 0.15, "int4": 0.8}
"""Of the mean error of all layers: random weights, whose errors nothing corrects, are worse off than trained ones."""
MAX_GATE_TOKENS = 384
NUM_GATE_LAYERS = 2
NUM_GATE_VOCABULARY = 1024
WIDENED_AT_ONCE = 1 << 22
"""Elements of a weight that are float32 at a time: they stay in a CPU's cache until they are used."""
_BLOCK_SIZE = 4
_DIFFERENCE = "its logits differ from its own forward"


@dataclass(frozen=True, slots=True)
class GateResult:
    """What the gate found. `shapes` are the attention layers of a model that passed for the paged tier."""

    passed: bool
    reason: str
    shapes: dict[nn.Module, LayerShape]


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error of a position's logits that rounding can explain."""
    return TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)


def paged_gate(model: PreTrainedModel, *, fixed_order: bool = True) -> GateResult:
    """Try the paged tier. On success the model is left with our attention and (with `fixed_order`) experts functions,
    else with its own.
    """
    own_experts = getattr(model.config, "_experts_implementation")  # noqa: B009 # there is no public name
    shapes, reason = _compare(model, fixed_order=fixed_order)
    if reason.startswith(_DIFFERENCE) and model.dtype not in TOLERANCE and _float32_copy_fits(model):
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
    reason = _unsupported_layers(config)
    if reason:
        return {}, reason
    prompts = _prompts(config)
    try:
        expected = [_eager_logits(model, prompt) for prompt in prompts]
        model.set_attn_implementation(ATTENTION_NAME)
        if fixed_order:
            model.set_experts_implementation(EXPERTS_NAME)
        cache = KVCache(2 * (max(map(len, prompts)) + _BLOCK_SIZE), model.device)
        runner = PagedRunner(model, cache, _BLOCK_SIZE, fixed_order=fixed_order)
        actual = _in_steps(runner, prompts)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 # whatever a model's code raises: it cannot be run in this way
        return {}, f"its forward pass cannot run packed ({type(error).__name__}: {_first_line(error)})"
    mismatch = _layer_mismatch(config, list(runner.last_calls.values()), cache.shapes)
    return cache.shapes, mismatch or _difference(expected, actual, model.dtype)


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
    prompts = _prompts(model.config.get_text_config())
    expected = [_eager_logits(model, prompt) for prompt in prompts]
    try:
        reason = _difference(expected, _in_steps(runner, prompts, chunked=False), model.dtype)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 # as above
        reason = f"its forward pass cannot run padded ({type(error).__name__}: {_first_line(error)})"
    return GateResult(passed=not reason, reason=reason or found, shapes={})


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
    return [[token % NUM_GATE_VOCABULARY for token in prompt] for prompt in _prompts(model.config)]


def _runner_difference(small: PreTrainedModel, runner: ModelRunner, prompts: list[list[int]]) -> str:
    expected = [_eager_logits(small, prompt) for prompt in prompts]
    return _difference(expected, _in_steps(runner, prompts, block_size=BLOCK), torch.float32)


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
        self._prompts = _prompts(model.config)
        self._num_calls: dict[nn.Module, int] = {}
        self.shapes: dict[nn.Module, LayerShape] = {}
        model.set_attn_implementation("eager")
        with _in_float32(model), self._seeing_attention(model):
            self._expected = _eager_logits_together(model, self._prompts)
        self.num_positions = max(map(len, self._prompts))
        self.num_blocks = 2 * -(-self.num_positions // BLOCK)

    @property
    def windows(self) -> list[int | None]:
        """The sliding window of each layer, as the model's own forward names it."""
        return [shape.sliding_window for shape in self.shapes.values()]

    def mismatch(self) -> str:
        """Why the model's attention is not what its configuration tells; empty where it is."""
        num_calls = list(self._num_calls.values())
        return _unsupported_layers(self._config) or _layer_mismatch(self._config, num_calls, self.shapes)

    def difference(self, runner: ModelRunner, block_size: int = BLOCK) -> str:
        """How the runner's logits, of all layers, differ by more than rounding explains; empty where they do not."""
        actual = _in_steps(runner, self._prompts, block_size=block_size)
        errors = torch.cat([_errors(*pair) for pair in zip(self._expected, actual, strict=True)])
        mean = float(errors.nan_to_num(nan=float("inf")).mean())
        return f"{_DIFFERENCE} by {mean:.2g} of their size" if mean > self._tolerance else ""

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


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, products and embeddings are float32, and with them what follows from them.

    Torch's products of a low precision take many times as long on a CPU without instructions for it.
    """
    scratch = torch.empty(WIDENED_AT_ONCE, device=model.device)
    changed = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(_float32_linear, module, scratch)  # type: ignore[method-assign]  # while it lasts
        elif isinstance(module, nn.Embedding):
            module.forward = partial(_float32_embedding, module)  # type: ignore[method-assign]  # as above
        else:
            continue
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _float32_linear(linear: nn.Linear, scratch: Tensor, rows: Tensor) -> Tensor:
    columns = rows.reshape(-1, rows.shape[-1]).T
    parts = []
    for part in torch.split(linear.weight, max(1, scratch.numel() // linear.in_features)):
        fits = part.numel() <= scratch.numel()
        wide = scratch[: part.numel()].view_as(part) if fits else scratch.new_empty(part.shape)
        parts.append(wide.copy_(part) @ columns)
    output = torch.cat(parts).T.reshape(*rows.shape[:-1], -1)
    return output if linear.bias is None else output + linear.bias


def _float32_embedding(embedding: nn.Embedding, token_ids: Tensor) -> Tensor:
    return F.embedding(token_ids, embedding.weight).float()


def _unsupported_layers(config: PreTrainedConfig) -> str:
    kinds = set(getattr(config, "layer_types", None) or ())
    strange = sorted(kinds - {"full_attention", "sliding_attention"})
    return f"it has layers of type {', '.join(strange)}" if strange else ""


def _expected_windows(config: PreTrainedConfig) -> list[int | None] | None:
    """The window of each layer as the configuration tells it; None where it does not tell."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    return [window] * config.num_hidden_layers


def _layer_mismatch(config: PreTrainedConfig, num_calls: list[int], shapes: dict[nn.Module, LayerShape]) -> str:
    """num_calls: of each layer's attention in one forward."""
    if len(num_calls) != config.num_hidden_layers or set(num_calls) != {1}:
        return f"its attention came to us {sum(num_calls)} times in a forward of {config.num_hidden_layers} layers"
    expected = _expected_windows(config)
    windows = [shape.sliding_window for shape in shapes.values()]
    # A window longer than the gate's prompts would not show in the logits.
    if expected is not None and windows != expected:
        return "its sliding windows do not reach the attention function"
    return ""


def _prompts(config: PreTrainedConfig) -> list[list[int]]:
    """Two prompts of fixed arbitrary ids, the first longer than a short sliding window; a long one would not show."""
    window = getattr(config, "sliding_window", None) or 0
    length = max(21, window + 13) if window + 15 <= MAX_GATE_TOKENS else 21
    limit = getattr(config, "max_position_embeddings", None) or length
    vocab = config.vocab_size
    generator = torch.Generator().manual_seed(0)
    # The second is long enough to share a padded cohort with the first.
    lengths = [max(3, min(n, limit)) for n in (length, length // 2 + 2)]
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def _eager_logits(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    ids = torch.tensor([prompt], device=model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return logits.float()


@torch.inference_mode()
def _eager_logits_together(model: PreTrainedModel, prompts: list[list[int]]) -> list[Tensor]:
    """The same of several prompts in one forward: no token sees what fills up the shorter ones behind it."""
    length = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (length - len(prompt)) for prompt in prompts], device=model.device)
    mask = torch.tensor([[1] * len(prompt) + [0] * (length - len(prompt)) for prompt in prompts], device=model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [rows[: len(prompt)].float() for rows, prompt in zip(logits, prompts, strict=True)]


def _in_steps(
    runner: ModelRunner, prompts: list[list[int]], *, chunked: bool = True, block_size: int = _BLOCK_SIZE
) -> list[Tensor]:
    """Logits of each position, computed in two chunks (or one) and two decode steps."""
    scoring = SamplingParams(seed=0, max_tokens=3, num_prompt_logprobs=0)
    sequences = []
    for index, prompt in enumerate(prompts):
        sequence = Sequence(index, choice_index=0, prompt_token_ids=prompt[:-2], sampling=scoring)
        sequence.status = SequenceStatus.RUNNING
        num_blocks = -(-len(prompt) // block_size)
        # Interleaved block numbers, so that a mistake in the addressing cannot hide.
        sequence.block_ids = [i * 2 + index for i in range(num_blocks)]
        sequences.append(sequence)
    collected: list[list[Tensor]] = [[] for _ in prompts]
    cuts = [[0, *([len(p) // 2] if chunked else []), len(p) - 2, len(p) - 1, len(p)] for p in prompts]
    for step in range(len(cuts[0]) - 1):
        for sequence, prompt, cut in zip(sequences, prompts, cuts, strict=True):
            sequence.token_ids += prompt[len(sequence.token_ids) : cut[step + 1]]
        batch = [
            ScheduledSequence(s, cut[step], cut[step + 1] - cut[step]) for s, cut in zip(sequences, cuts, strict=True)
        ]
        logits = runner.run(batch).float().clone()
        offset = 0
        for index, scheduled in enumerate(batch):
            collected[index].append(logits[offset : offset + scheduled.num_logit_rows])
            offset += scheduled.num_logit_rows
    return [torch.cat(rows) for rows in collected]


def _difference(expected: list[Tensor], actual: list[Tensor], dtype: torch.dtype) -> str:
    worst = 0.0
    for reference, logits in zip(expected, actual, strict=True):
        if reference.shape != logits.shape:
            return f"its logits have shape {tuple(logits.shape)} where its own forward gives {tuple(reference.shape)}"
        worst = max(worst, float(_errors(reference, logits).nan_to_num(nan=float("inf")).max()))
    if worst > tolerance(dtype):
        return f"{_DIFFERENCE} by {worst:.2g} of their size"
    return ""


def _errors(reference: Tensor, logits: Tensor) -> Tensor:
    """Of each position, as a share of what its logits vary by."""
    centred = reference - reference.mean(-1, keepdim=True)
    errors: Tensor = (logits - reference).norm(dim=-1) / centred.norm(dim=-1).clamp(min=1e-12)
    return errors


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
