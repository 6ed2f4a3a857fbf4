"""From a name to a model that may be served: load, verify, freeze, choose the tier, size the KV pool."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from reprise.engine.execution import MAX_DRAFT_ROWS, Execution, NativeMismatchError, checked, choose_execution
from reprise.engine.load_progress import loading_weights
from reprise.engine.mapped_model import map_model
from reprise.engine.math_libraries import ask_for_one_order_here
from reprise.engine.memory import kv_budget
from reprise.engine.model_runner import ModelRunner
from reprise.engine.scheduler import SchedulingLimits
from reprise.engine.selection import Selection
from reprise.engine.weights import verify_weights
from reprise.errors import ModelLoadError
from reprise.ipc.messages import EngineConfig, Ready

DEFAULT_MAX_MODEL_LEN = 4096
"""For models that have no longest position, as state-space models."""
DRAFT_KV_SHARE = 0.25
"""Of the memory for keys and values, what a draft model takes at most."""
Progress = Callable[[str, float], None]
_NO_MODEL = ("_name_or_path", "dtype", "transformers_version")
"""Members of a configuration that tell how it was saved; the number format is a fact of its own."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class LoadedModel:
    """Everything that the engine core is built from."""

    runner: ModelRunner
    selection: Selection
    limits: SchedulingLimits
    num_blocks: int
    block_size: int
    ready: Ready
    num_token_ids: int
    """Ids below this can be computed and chosen."""
    looks_up: bool = False
    """Whether guesses come from what was said before."""
    draft: LoadedModel | None = None
    """Whose guesses they are."""
    key_value_memory: Sequence[Tensor] = ()
    """The tensors of its KV pool, and of the draft model's."""


def load(config: EngineConfig, progress: Progress) -> LoadedModel:
    """Raises ModelLoadError with the cause and the remedy."""
    started = time.monotonic()
    device = choose_device(config.device)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if config.deterministic is not False:
        ask_for_one_order_here(os.environ)
    # transformers would have a service of the hub convert a repository's pickles, and load what that offers.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    progress("reading the configuration", 0.0)
    model_config = load_config(config)
    dtype = choose_dtype(config.dtype, model_config, device)
    progress("loading weights", 0.1)
    with loading_weights(lambda share: progress("loading weights", 0.1 + 0.3 * share)):
        model = load_weights(config, model_config, dtype, device)
    # Of a model over mapped files, they are read here.
    fingerprint = verify_weights(model, lambda share: progress("checking weights", 0.4 + 0.4 * share))
    max_model_len = choose_max_model_len(config, model_config)
    freeze_rope(model, max_model_len)
    draft, beside_draft = load_draft(config, max_model_len, device, progress)
    progress("running the equivalence gate", 0.85)
    num_parameters, vocab_size = sum(p.numel() for p in model.parameters()), output_size(model)
    num_token_ids = min(vocab_size, input_size(model))
    execution: Execution | None = None
    try:
        execution = choose_execution(model, beside_draft, max_model_len, device)
    except NativeMismatchError as error:
        if config.kernels == "native":
            raise ModelLoadError(f"--kernels native was asked for, but {error}") from None
        logger.warning("%s: loading the model once more, for torch", error)
    if execution is None:
        del model, draft  # not beside those that are loaded now
        return load(msgspec.structs.replace(config, kernels="torch"), progress)
    pool = execution.pool
    progress("checking that answers repeat", 0.95)
    repeatability = checked(config, execution)
    limits = execution.limits
    if not repeatability.passed:
        limits = dataclasses.replace(limits, max_draft_rows=0)
    ready = Ready(
        tier=execution.tier,
        tier_reason=execution.reason,
        kernels=execution.kernels,
        device=device.type,
        device_name=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        architecture=type(model).__name__,
        num_parameters=num_parameters,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        num_kv_tokens=pool.num_tokens,
        kv_cache_memory=pool.num_tokens * pool.bytes_per_token + (draft.ready.kv_cache_memory if draft else 0),
        max_sequence_tokens=min(max_model_len, pool.num_tokens),
        max_num_seqs=config.max_num_seqs,
        weights_fingerprint=fingerprint,
        model_config_fingerprint=fingerprint_of_config(model_config),
        load_seconds=time.monotonic() - started,
        deterministic=repeatability.passed,
        deterministic_reason=repeatability.reason,
        numerics_fingerprint=repeatability.fingerprint,
    )
    if config.speculate != "none" and not limits.max_draft_rows:
        logger.warning("--speculate %s is without effect: answers would depend on it here", config.speculate)
        draft = None
    return LoadedModel(
        *(execution.runner, execution.selection, limits, pool.num_blocks, pool.block_size, ready, num_token_ids),
        looks_up=config.speculate == "ngram",
        draft=draft,
        key_value_memory=[*execution.key_value_memory, *(draft.key_value_memory if draft else ())],
    )


def load_draft(
    config: EngineConfig, max_model_len: int, device: torch.device, progress: Progress
) -> tuple[LoadedModel | None, EngineConfig]:
    """The draft model, where one is asked for, and the settings with the memory that it leaves.

    It has keys and values for as many sequences as have drafts at once. The memory is looked at once, so that what the
    two pools took together is enough for both in the engine's next life. Raises ModelLoadError naming the setting.
    """
    if config.speculate != "draft" or config.draft_model is None or config.deterministic is False:
        return None, config
    memory = config.kv_cache_memory or kv_budget(device, config.gpu_memory_utilization)
    of_draft = msgspec.structs.replace(
        config,
        model=config.draft_model,
        revision=None,
        tier="paged",
        quantize="none",
        max_num_seqs=MAX_DRAFT_ROWS // 2,
        kv_cache_memory=int(memory * DRAFT_KV_SHARE),
        prefix_cache=False,
        speculate="none",
        draft_model=None,
        deterministic=None,
    )
    try:
        model_config = load_config(of_draft)
        longest = choose_max_model_len(msgspec.structs.replace(of_draft, max_model_len=None), model_config)
        of_draft = msgspec.structs.replace(of_draft, max_model_len=min(longest, max_model_len))
        draft = load(of_draft, lambda _, share: progress("loading the draft model", share))
    except ModelLoadError as error:
        raise ModelLoadError(f"--draft-model: {error}") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise ModelLoadError(f"--draft-model: '{config.draft_model}' does not fit into memory") from None
    memory -= draft.ready.kv_cache_memory
    if config.kv_cache_memory is None and device.type == "cuda":
        # Its weights lie in what was free.
        memory -= draft.ready.num_parameters * getattr(torch, draft.ready.dtype).itemsize
    return draft, msgspec.structs.replace(config, kv_cache_memory=memory)


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


def load_weights(
    config: EngineConfig, model_config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Safetensors alone, no remote code; missing, unexpected and misshapen tensors are refused by name."""
    mapped = map_model(config.model, model_config, dtype) if device.type == "cpu" else None
    if mapped is not None:
        return mapped
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


def fingerprint_of_config(model_config: PreTrainedConfig) -> str:
    """A fingerprint of the model's configuration, what it leaves to defaults included."""
    members = model_config.to_dict()
    for name in _NO_MODEL:
        members.pop(name, None)
    return hashlib.blake2b(json.dumps(members, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


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


def input_size(model: PreTrainedModel) -> int:
    """Token ids that the model has embeddings for."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def output_size(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    if embeddings is not None and hasattr(embeddings, "weight"):
        return int(embeddings.weight.shape[0])
    return int(model.config.get_text_config().vocab_size)
