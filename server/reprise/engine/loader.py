"""From a name to a model that may be served: load, verify, freeze, choose the tier, size the KV pool."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from reprise.engine.gate import GateResult, padding_gate, paged_gate
from reprise.engine.kv_cache import KVCache
from reprise.engine.load_progress import loading_weights
from reprise.engine.memory import kv_budget
from reprise.engine.model_runner import ModelRunner, PagedRunner
from reprise.engine.padded_runner import PaddedRunner
from reprise.engine.scheduler import SchedulingLimits
from reprise.errors import ModelLoadError
from reprise.ipc.messages import EngineConfig, Ready

DEFAULT_MAX_MODEL_LEN = 4096
"""For models that have no longest position, as state-space models."""
PADDED_BYTES_PER_TOKEN_FALLBACK = 4096

Progress = Callable[[str, float], None]


@dataclass(slots=True)
class LoadedModel:
    """Everything that the engine core is built from."""

    runner: ModelRunner
    limits: SchedulingLimits
    num_blocks: int
    block_size: int
    ready: Ready


def load(config: EngineConfig, progress: Progress) -> LoadedModel:
    """Raises ModelLoadError with the cause and the remedy."""
    started = time.monotonic()
    device = choose_device(config.device)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    progress("reading the configuration", 0.0)
    model_config = load_config(config)
    dtype = choose_dtype(config.dtype, model_config, device)
    progress("loading weights", 0.1)
    with loading_weights(lambda share: progress("loading weights", 0.1 + 0.6 * share)):
        model = load_weights(config, dtype, device)
    progress("checking weights", 0.7)
    fingerprint = verify_weights(model)
    max_model_len = choose_max_model_len(config, model_config)
    freeze_rope(model, max_model_len)
    progress("running the equivalence gate", 0.85)
    tier = choose_tier(model, config)
    progress("allocating the KV pool", 0.95)
    num_kv_tokens = size_kv_pool(config, model, tier, max_model_len, device)
    num_blocks = num_kv_tokens // config.block_size
    max_sequence_tokens = min(max_model_len, num_blocks * config.block_size)
    limits = scheduling_limits(config, max_sequence_tokens, paged=tier.passed)
    runner: ModelRunner
    if tier.passed:
        cache = KVCache(num_blocks * config.block_size, device, tier.shapes)
        runner = PagedRunner(model, cache, config.block_size)
    else:
        runner = PaddedRunner(
            model,
            max_padded_tokens=max(4 * config.max_num_batched_tokens, max_sequence_tokens),
            padding_is_inert=choose_padding(model),
        )
    ready = Ready(
        tier="paged" if tier.passed else "padded",
        tier_reason=tier.reason,
        device=device.type,
        device_name=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        architecture=type(model).__name__,
        num_parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=output_size(model),
        max_model_len=max_model_len,
        num_kv_tokens=num_blocks * config.block_size,
        kv_cache_memory=num_kv_tokens * bytes_per_token(model, tier),
        max_sequence_tokens=max_sequence_tokens,
        max_num_seqs=config.max_num_seqs,
        weights_fingerprint=fingerprint,
        load_seconds=time.monotonic() - started,
    )
    return LoadedModel(runner, limits, num_blocks, config.block_size, ready)


def choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(
            "device 'cuda' was asked for, but torch sees no CUDA GPU: use --device cpu, or install a CUDA torch"
        )
    return torch.device(device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{count} thread" if count == 1 else f"{count} threads"


def choose_dtype(name: str, model_config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """`auto`: the checkpoint's own, but float32 for float16 on a CPU, which computes float16 slowly and loosely."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    saved = getattr(model_config.get_text_config(), "dtype", None) or getattr(model_config, "dtype", None)
    if not isinstance(saved, torch.dtype) or not saved.is_floating_point:
        return torch.float32
    if saved is torch.float16 and device.type == "cpu":
        return torch.float32
    return saved


def load_config(config: EngineConfig) -> PreTrainedConfig:
    try:
        loaded: PreTrainedConfig = AutoConfig.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"no model can be read at '{config.model}': {error}") from error
    if getattr(loaded, "is_encoder_decoder", False):
        raise ModelLoadError(f"'{config.model}' is an encoder-decoder; Reprise serves causal language models")
    return loaded


def load_weights(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Safetensors alone, no remote code; missing, unexpected and misshapen tensors are refused by name."""
    try:
        result: Any = AutoModelForCausalLM.from_pretrained(
            config.model,
            revision=config.revision,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            # Refused below, where the tensors have names; transformers would only print them.
            ignore_mismatched_sizes=True,
            # Straight to the GPU; a CPU model is there already.
            **({"device_map": {"": device}} if device.type == "cuda" else {}),
        )
    except Exception as error:
        raise ModelLoadError(f"the weights of '{config.model}' cannot be loaded: {error}") from error
    model, info = result
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = sorted(str(name) for name in info.get(kind) or ())
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise ModelLoadError(
                f"the weights of '{config.model}' do not fit its architecture: {kind.replace('_', ' ')}: {shown}"
            )
    loaded: PreTrainedModel = model.eval().to(device)
    return loaded


def verify_weights(model: nn.Module) -> str:
    """A fingerprint of all weights. Raises ModelLoadError naming each tensor that holds NaN or infinity."""
    digest = hashlib.blake2b(digest_size=8)
    broken = []
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            broken.append(name)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    if broken:
        raise ModelLoadError(f"weights with NaN or infinite values: {', '.join(broken[:8])}")
    return digest.hexdigest()


def choose_max_model_len(config: EngineConfig, model_config: PreTrainedConfig) -> int:
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and limit <= 0:
        limit = None
    if config.max_model_len is None:
        return int(limit) if limit else DEFAULT_MAX_MODEL_LEN
    if limit and config.max_model_len > limit and not scales_rope(model_config):
        raise ModelLoadError(
            f"max_model_len {config.max_model_len} is above the model's {limit} positions: use {limit} or less"
        )
    return config.max_model_len


def scales_rope(model_config: PreTrainedConfig) -> bool:
    """Whether the model's rotary frequencies are made for lengths above its configured one."""
    return "dynamic" in str(getattr(model_config.get_text_config(), "rope_parameters", ""))


def freeze_rope(model: nn.Module, max_model_len: int) -> None:
    """Fix the frequencies of rotary embeddings that follow the longest position of a batch.

    A neighbour would else change a sequence's logits. The frequencies become those of a sequence of
    `max_model_len` tokens, for every sequence.
    """
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        by_layer: dict[str | None, Any] = dict(kinds) if isinstance(kinds, dict) else {None: kinds}
        for layer_type, kind in by_layer.items():
            if kind != "longrope" and "dynamic" not in str(kind):
                continue
            device = next(model.parameters()).device
            position = torch.tensor([[max_model_len - 1]], device=device)
            arguments = (torch.zeros(1, device=device), position)
            with torch.inference_mode(mode=False), torch.no_grad():
                module(*arguments, *([layer_type] if layer_type is not None else []))
            if layer_type is None:
                setattr(module, "rope_type", "frozen")  # noqa: B010 # of a class that we do not know
            else:
                kinds[layer_type] = "frozen"


def choose_tier(model: PreTrainedModel, config: EngineConfig) -> GateResult:
    if config.tier == "padded":
        return GateResult(passed=False, reason="asked for with --tier padded", shapes={})
    result = paged_gate(model)
    if config.tier == "paged" and not result.passed:
        raise ModelLoadError(f"--tier paged was asked for, but the model cannot run there: {result.reason}")
    return result


def choose_padding(model: PreTrainedModel) -> bool:
    """Whether prompts of unequal lengths may share a cohort. Raises ModelLoadError where not even equal ones may."""
    if padding_gate(model).passed:
        return True
    alone = padding_gate(model, padding_is_inert=False)
    if not alone.passed:
        raise ModelLoadError(f"the model cannot be served: token by token, {alone.reason}")
    return False


def size_kv_pool(
    config: EngineConfig, model: PreTrainedModel, tier: GateResult, max_model_len: int, device: torch.device
) -> int:
    """Tokens of the pool: what the memory budget holds, and no more than all sequences can use at their longest."""
    per_token = bytes_per_token(model, tier)
    budget = config.kv_cache_memory
    if budget is None:
        budget = kv_budget(device, config.gpu_memory_utilization)
    useful = config.max_num_seqs * (-(-max_model_len // config.block_size)) * config.block_size
    tokens = min(budget // per_token, useful)
    smallest = max(config.block_size, min(max_model_len, 2 * config.block_size))
    if tokens < smallest:
        raise ModelLoadError(
            f"a KV pool of {budget} bytes holds {tokens} tokens at {per_token} bytes a token, fewer than the"
            f" {smallest} it takes to serve: raise --kv-cache-memory"
        )
    return tokens // config.block_size * config.block_size


def bytes_per_token(model: PreTrainedModel, tier: GateResult) -> int:
    """Of the KV pool, all layers together."""
    return sum(shape.bytes_per_token for shape in tier.shapes.values()) or padded_bytes_per_token(model)


def padded_bytes_per_token(model: PreTrainedModel) -> int:
    """An estimate for models whose cache transformers keeps: two vectors of the hidden size in every layer."""
    text = model.config.get_text_config()
    layers, hidden = getattr(text, "num_hidden_layers", 0), getattr(text, "hidden_size", 0)
    return 2 * layers * hidden * model.dtype.itemsize or PADDED_BYTES_PER_TOKEN_FALLBACK


def scheduling_limits(config: EngineConfig, max_sequence_tokens: int, *, paged: bool) -> SchedulingLimits:
    if paged:
        budget = max(config.max_num_batched_tokens, config.max_num_seqs)
        return SchedulingLimits(config.max_num_seqs, budget, prefix_cache=config.prefix_cache)
    # A pass of the padded tier is never cut, so the longest one must fit beside everybody's next token.
    budget = max(config.max_num_batched_tokens, max_sequence_tokens) + config.max_num_seqs
    return SchedulingLimits(config.max_num_seqs, budget, chunked=False, prefix_cache=False)


def output_size(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    if embeddings is not None and hasattr(embeddings, "weight"):
        return int(embeddings.weight.shape[0])
    return int(model.config.get_text_config().vocab_size)
