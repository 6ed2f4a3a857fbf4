"""How a model is run: the tier and kernels that fit it, proven equal to its own forward and checked to repeat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reprise.engine.alone_runner import AloneRunner
from reprise.engine.cuda.attention import PAGE, VarlenAttention, plain_attention
from reprise.engine.cuda.decoder import CudaDecoder, FusedWeights
from reprise.engine.cuda.decoder import unsupported as unsupported_on_cuda
from reprise.engine.cuda.products import BlasSettings, choose_products, without_order
from reprise.engine.cuda.runner import CudaRunner
from reprise.engine.decoder_gate import NativeGate, cuda_layers_gate, native_layers_gate
from reprise.engine.device import is_lost
from reprise.engine.gate import GateResult, alone_gate, equal_over, padding_gate, paged_gate
from reprise.engine.kv_cache import KVCache
from reprise.engine.kv_pool import Pool, padded_bytes_per_token, paged_bytes_per_token, size_pool
from reprise.engine.model_runner import ModelRunner, PagedRunner
from reprise.engine.native.decoder import BLOCK, NativeDecoder, unsupported
from reprise.engine.native.library import NativeContext, built_variants
from reprise.engine.native.runner import NativeRunner
from reprise.engine.native.selection import NativeSelection
from reprise.engine.padded_runner import PaddedRunner
from reprise.engine.repeatability import (
    NUM_CHECK_BLOCKS,
    NUM_PROMPT_TOKENS,
    Repeatability,
    check_alone,
    check_paged,
    check_runner,
    fingerprint_of,
    num_check_blocks,
)
from reprise.engine.scheduler import SchedulingLimits
from reprise.engine.selection import Selection, TorchSelection
from reprise.errors import ModelLoadError
from reprise.ipc.messages import EngineConfig, Tier

MAX_DRAFT_ROWS = 8
"""Of a step: as many as cost hardly more than one, since they are computed while the weights are read."""
ALONE_STEP_TOKENS = 128
"""Of a step where each token may be a forward of its own: so that a replay does not stop the other streams for long."""


logger = logging.getLogger(__name__)


class NativeMismatchError(Exception):
    """The native decoder has taken a model's weights and does not give its logits."""


@dataclass(frozen=True, slots=True)
class Execution:
    """What runs a model, and what was found about it."""

    tier: Tier
    reason: str
    kernels: str
    pool: Pool
    limits: SchedulingLimits
    runner: ModelRunner
    selection: Selection
    check: Callable[[], Repeatability]
    """Whether its answers repeat: some forwards."""
    key_value_memory: Sequence[Tensor] = ()
    """The tensors of the pool, but for layers that are allocated when they are first seen."""


def choose_execution(
    model: PreTrainedModel, config: EngineConfig, max_model_len: int, device: torch.device
) -> Execution:
    """The fastest way that passes its checks. The model may have lost its weights to it.

    Raises ModelLoadError, and NativeMismatchError where the weights are lost for nothing.
    """
    if device.type == "cuda":
        on_cuda = cuda_paged(model, config, max_model_len, device)
        if isinstance(on_cuda, Execution):
            return on_cuda
        logger.warning("the model runs through torch and transformers: %s", on_cuda)
    refusal = native_refusal(model, config)
    gate = None if refusal else NativeGate(model, config.quantize)
    if gate is not None:
        refusal = gate.mismatch() or native_layers_gate(model, gate.windows)
        if not refusal:
            return native_paged(model, config, gate, max_model_len, device)
    tier = choose_tier(model, config)
    if tier.passed:
        if config.kernels == "native":
            raise ModelLoadError(f"--kernels native was asked for, but {refusal}")
        if config.quantize != "none":
            raise ModelLoadError(
                f"--quantize {config.quantize} was asked for, which the native decoder does: {refusal}"
            )
        return torch_paged(model, config, tier, max_model_len, device)
    if config.quantize != "none":
        where = "which the native decoder does, on the paged tier"
        raise ModelLoadError(f"--quantize {config.quantize} was asked for, {where}: {tier.reason}")
    if config.deterministic:
        return alone(model, config, tier, max_model_len, device)
    return padded(model, config, tier, max_model_len, device)


def choose_tier(model: PreTrainedModel, config: EngineConfig) -> GateResult:
    if config.tier == "padded":
        return GateResult(passed=False, reason="asked for with --tier padded", shapes={})
    result = paged_gate(model, fixed_order=config.deterministic is not False)
    if config.tier == "paged" and not result.passed:
        raise ModelLoadError(f"--tier paged was asked for, but the model cannot run there: {result.reason}")
    return result


def native_refusal(model: PreTrainedModel, config: EngineConfig) -> str:
    """Why the native decoder is not tried with this model; empty where it is."""
    if config.tier == "padded":
        return "--tier padded was asked for"
    if config.kernels == "torch":
        return "--kernels torch was asked for"
    if config.kernels == "auto" and config.deterministic is False:
        return "--no-deterministic was asked for, and the native decoder repeats in any case"
    return unsupported(model, config.quantize)


def native_paged(
    model: PreTrainedModel, config: EngineConfig, gate: NativeGate, max_model_len: int, device: torch.device
) -> Execution:
    """Raises NativeMismatchError where the weights are lost for nothing."""
    block_size = -(-config.block_size // BLOCK) * BLOCK
    pool = size_pool(config, paged_bytes_per_token(gate.shapes), max_model_len, device, block_size)
    context = native_context(torch.get_num_threads())
    decoder = NativeDecoder(
        model,
        gate.windows,
        num_blocks=max(pool.num_tokens // BLOCK, NUM_CHECK_BLOCKS, gate.num_blocks),
        max_positions=max(max_model_len, gate.num_positions),
        context=context,
        quantize=config.quantize,
        release=True,
    )
    checker = NativeRunner(decoder, BLOCK)
    difference = gate.difference(checker)
    if difference:
        raise NativeMismatchError(f"in the native decoder {difference}")
    return Execution(
        tier="paged",
        reason=equal_over(gate.shapes),
        kernels=", ".join(["native", context.variant, *([config.quantize] if config.quantize != "none" else [])]),
        pool=pool,
        limits=paged_limits(config),
        runner=NativeRunner(decoder, block_size),
        selection=NativeSelection(context),
        check=lambda: check_runner(checker, decoder.vocab_size, min(max_model_len, pool.num_tokens)),
        key_value_memory=decoder.key_value_memory,
    )


def cuda_paged(
    model: PreTrainedModel, config: EngineConfig, max_model_len: int, device: torch.device
) -> Execution | str:
    """With the decoder for CUDA, on any device; or why not, and then the model can be run as before.

    Raises ModelLoadError where the device is of no use any more.
    """
    if config.tier == "padded" or config.kernels != "auto" or config.quantize != "none":
        return "other kernels were asked for than those of the decoder for CUDA"
    refusal = unsupported_on_cuda(model)
    if refusal:
        return refusal
    with ExitStack() as unless_it_runs:
        if device.type == "cuda":
            unless_it_runs.callback(BlasSettings.now().apply)
        try:
            found = _checked_cuda_paged(model, config, max_model_len, device)
        except (MemoryError, torch.OutOfMemoryError, ModelLoadError):
            raise
        except Exception as error:
            # Whatever a kernel that this GPU or this torch does not have is reported as.
            if is_lost(device):
                raise ModelLoadError(f"the decoder for CUDA broke the GPU, try --kernels torch: {error}") from error
            logger.exception("the decoder for CUDA failed")
            return f"the decoder for CUDA failed with {type(error).__name__}"
        if isinstance(found, Execution):
            unless_it_runs.pop_all()
        return found


def _checked_cuda_paged(
    model: PreTrainedModel, config: EngineConfig, max_model_len: int, device: torch.device
) -> Execution | str:
    gate = NativeGate(model)
    refusal = gate.mismatch() or cuda_layers_gate(model, gate.windows)
    if refusal:
        return refusal
    fixed_order = config.deterministic is not False
    limits = paged_limits(config)
    on_gpu = device.type == "cuda"
    weights = FusedWeights(model, gate.windows)
    if on_gpu and fixed_order:
        BlasSettings.of_one_order().apply()
    choose = choose_products if fixed_order else without_order
    most_rows = max(limits.max_num_batched_tokens, NUM_PROMPT_TOKENS, 2 * gate.num_positions)
    products = choose(weights.matrices, most_rows)
    block_size = -(-config.block_size // PAGE) * PAGE if on_gpu else config.block_size
    pool = size_pool(config, paged_bytes_per_token(gate.shapes), max_model_len, device, block_size)
    max_positions = max(max_model_len, gate.num_positions)
    decoder = CudaDecoder(
        model,
        weights,
        products,
        VarlenAttention(max_positions) if on_gpu else plain_attention,
        num_blocks=max(pool.num_blocks, num_check_blocks(block_size), 2 * -(-gate.num_positions // block_size)),
        block_size=block_size,
        max_positions=max_positions,
    )
    runner = CudaRunner(decoder, config.max_num_seqs)
    difference = gate.difference(runner, block_size)
    if difference:
        return f"in the decoder for CUDA {difference}"

    def check() -> Repeatability:
        longest = min(max_model_len, pool.num_tokens)
        found = check_runner(runner, decoder.vocab_size, longest, block_size=block_size)
        return found if fixed_order else replace(found, passed=False, reason="turned off")

    return Execution(
        tier="paged",
        reason=equal_over(gate.shapes),
        kernels=f"cuda, {products}",
        pool=pool,
        limits=limits,
        runner=runner,
        selection=TorchSelection(),
        check=check,
    )


def torch_paged(
    model: PreTrainedModel, config: EngineConfig, tier: GateResult, max_model_len: int, device: torch.device
) -> Execution:
    pool = size_pool(config, paged_bytes_per_token(tier.shapes), max_model_len, device)
    fixed_order = config.deterministic is not False
    cache = KVCache(pool.num_tokens, device, tier.shapes)
    return Execution(
        tier="paged",
        reason=tier.reason,
        kernels="torch",
        pool=pool,
        limits=paged_limits(config),
        runner=PagedRunner(model, cache, pool.block_size, fixed_order=fixed_order),
        selection=choose_selection(config, device),
        check=lambda: check_paged(model, tier.shapes, min(max_model_len, pool.num_tokens), fixed_order=fixed_order),
        key_value_memory=cache.memory,
    )


def alone(
    model: PreTrainedModel, config: EngineConfig, tier: GateResult, max_model_len: int, device: torch.device
) -> Execution:
    """Raises ModelLoadError where even a sequence by itself does not get the model's own logits."""
    gate = alone_gate(model)
    if not gate.passed:
        raise ModelLoadError(f"the model cannot be served: token by token, {gate.reason}")
    pool = size_pool(config, padded_bytes_per_token(model), max_model_len, device)
    limits = SchedulingLimits(config.max_num_seqs, max(ALONE_STEP_TOKENS, config.max_num_seqs), prefix_cache=False)
    return Execution(
        tier="padded",
        reason=tier.reason,
        kernels="torch",
        pool=pool,
        limits=limits,
        runner=AloneRunner(model),
        selection=choose_selection(config, device),
        check=lambda: check_alone(model, min(max_model_len, pool.num_tokens)),
    )


def padded(
    model: PreTrainedModel, config: EngineConfig, tier: GateResult, max_model_len: int, device: torch.device
) -> Execution:
    pool = size_pool(config, padded_bytes_per_token(model), max_model_len, device)
    max_sequence_tokens = min(max_model_len, pool.num_tokens)
    # A pass of a cohort is never cut, so the longest one must fit beside everybody's next token.
    budget = max(config.max_num_batched_tokens, max_sequence_tokens) + config.max_num_seqs
    runner = PaddedRunner(
        model,
        max_padded_tokens=max(4 * config.max_num_batched_tokens, max_sequence_tokens),
        padding_is_inert=choose_padding(model),
    )
    reason = "turned off" if config.deterministic is False else "on the padded tier only with --deterministic"

    def check() -> Repeatability:
        fingerprint = fingerprint_of(model, runner, max_sequence_tokens)
        return Repeatability(passed=False, reason=reason, fingerprint=fingerprint)

    return Execution(
        tier="padded",
        reason=tier.reason,
        kernels="torch",
        pool=pool,
        limits=SchedulingLimits(config.max_num_seqs, budget, chunked=False, prefix_cache=False),
        runner=runner,
        selection=choose_selection(config, device),
        check=check,
    )


def choose_selection(config: EngineConfig, device: torch.device) -> Selection:
    if config.kernels == "torch" or device.type != "cpu" or not built_variants():
        return TorchSelection()
    return NativeSelection(native_context(torch.get_num_threads()))


@lru_cache(maxsize=1)
def native_context(num_threads: int) -> NativeContext:
    """Shared by the model and its draft model: threads of two contexts would be in each other's way."""
    return NativeContext(num_threads)


def choose_padding(model: PreTrainedModel) -> bool:
    """Whether prompts of unequal lengths may share a cohort. Raises ModelLoadError where not even equal ones may."""
    if padding_gate(model).passed:
        return True
    alone = padding_gate(model, padding_is_inert=False)
    if not alone.passed:
        raise ModelLoadError(f"the model cannot be served: token by token, {alone.reason}")
    return False


def checked(config: EngineConfig, execution: Execution) -> Repeatability:
    """Raises ModelLoadError where `deterministic` is asked for and the check fails."""
    found = execution.check()
    if config.deterministic and not found.passed:
        other = ", or add --tier padded, which computes each sequence by itself" if execution.tier == "paged" else ""
        raise ModelLoadError(
            f"--deterministic was asked for, but on this device {found.reason}: leave --deterministic out{other}"
        )
    return found


def paged_limits(config: EngineConfig) -> SchedulingLimits:
    budget = max(config.max_num_batched_tokens, config.max_num_seqs)
    return SchedulingLimits(
        config.max_num_seqs, budget, prefix_cache=config.prefix_cache, max_draft_rows=MAX_DRAFT_ROWS
    )
