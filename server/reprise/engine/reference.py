"""A model's own logits, and how those of another way of running it are compared with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from reprise.engine.kv_cache import LayerShape
from reprise.engine.model_runner import ModelRunner
from reprise.engine.scheduler import ScheduledSequence
from reprise.engine.sequence import Sequence, SequenceStatus
from reprise.types import SamplingParams

TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 0.08
MAX_GATE_TOKENS = 384
WIDENED_AT_ONCE = 1 << 22
"""Elements of a weight that are float32 at a time: they stay in a CPU's cache until they are used."""
STEP_BLOCK_SIZE = 4
DIFFERENCE = "its logits differ from its own forward"


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error of a position's logits that rounding can explain."""
    return TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)


def gate_prompts(config: PreTrainedConfig) -> list[list[int]]:
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
def eager_logits(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    ids = torch.tensor([prompt], device=model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return logits.float()


@torch.inference_mode()
def eager_logits_together(model: PreTrainedModel, prompts: list[list[int]]) -> list[Tensor]:
    """The same of several prompts in one forward: no token sees what fills up the shorter ones behind it."""
    length = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (length - len(prompt)) for prompt in prompts], device=model.device)
    mask = torch.tensor([[1] * len(prompt) + [0] * (length - len(prompt)) for prompt in prompts], device=model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [rows[: len(prompt)].float() for rows, prompt in zip(logits, prompts, strict=True)]


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
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


def in_steps(
    runner: ModelRunner, prompts: list[list[int]], *, chunked: bool = True, block_size: int = STEP_BLOCK_SIZE
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


def difference_of(expected: list[Tensor], actual: list[Tensor], dtype: torch.dtype) -> str:
    worst = 0.0
    for reference, logits in zip(expected, actual, strict=True):
        if reference.shape != logits.shape:
            return f"its logits have shape {tuple(logits.shape)} where its own forward gives {tuple(reference.shape)}"
        worst = max(worst, float(errors_of(reference, logits).nan_to_num(nan=float("inf")).max()))
    if worst > tolerance(dtype):
        return f"{DIFFERENCE} by {worst:.2g} of their size"
    return ""


def errors_of(reference: Tensor, logits: Tensor) -> Tensor:
    """Of each position, as a share of what its logits vary by."""
    centred = reference - reference.mean(-1, keepdim=True)
    errors: Tensor = (logits - reference).norm(dim=-1) / centred.norm(dim=-1).clamp(min=1e-12)
    return errors


def unsupported_layers(config: PreTrainedConfig) -> str:
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


def layer_mismatch(config: PreTrainedConfig, num_calls: list[int], shapes: dict[nn.Module, LayerShape]) -> str:
    """num_calls: of each layer's attention in one forward."""
    if len(num_calls) != config.num_hidden_layers or set(num_calls) != {1}:
        return f"its attention came to us {sum(num_calls)} times in a forward of {config.num_hidden_layers} layers"
    expected = _expected_windows(config)
    windows = [shape.sliding_window for shape in shapes.values()]
    # A window longer than the gate's prompts would not show in the logits.
    if expected is not None and windows != expected:
        return "its sliding windows do not reach the attention function"
    return ""
