"""Where the bits of a token begin to differ: its activations, module by module, computed in two or more ways.

The last token of a prompt is computed alone and at once, and then as `--ways` say; what each module gives for it is
compared bit by bit. The first module that differs is printed, and a table of all. Exit code 1: something differs.
Attention is computed by a function, not by a module: what it gave shows in the module after it.

ways: company      in one step with the prompts of others
      chunks       the prompt cut into chunks
      decode       the last token by itself, after the others
      tokens       token by token
      padded       as a row of a left-padded batch, by the model's own attention
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.report import print_report
from benchmarks.shapes import SHAPES, write_model
from reprise.engine import attention
from reprise.engine.gate import paged_gate
from reprise.engine.kv_cache import KVCache
from reprise.engine.model_runner import ModelRunner, PagedRunner
from reprise.engine.padded_runner import PaddedRunner
from reprise.engine.scheduler import ScheduledSequence
from reprise.engine.sequence import Sequence as EngineSequence
from reprise.types import SamplingParams

WAYS = ("company", "chunks", "decode", "tokens", "padded")
CHUNK = 7
_BLOCK_SIZE = 16
_GREEDY = SamplingParams(seed=0, temperature=0.0, max_tokens=1)


@dataclass
class Recorder:
    """The activations of one token in the latest forward, by the name of the module that gave them."""

    batch_row: int = 0
    """Row of the batch that has the token."""
    token_row: int = 0
    """Row of the packed tokens, or position in the padded row: negative from the end."""
    logits_row: int = 0
    activations: dict[str, Tensor] = field(default_factory=dict)
    _shape: tuple[int, int] = (0, 0)

    def watch(self, model: nn.Module) -> list[Any]:
        """Hooks on all modules; `remove()` takes one away."""
        handles: list[Any] = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, module in model.named_modules():
            if name and not isinstance(module, nn.ModuleList):
                handles.append(module.register_forward_hook(partial(self._record, name)))
        return handles

    def _begin(self, _module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        input_ids: Tensor = keywords["input_ids"] if "input_ids" in keywords else arguments[0]
        self._shape = (input_ids.shape[0], input_ids.shape[1])
        self.activations = {}

    def _record(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = next((item for item in output if isinstance(item, Tensor)), None) if _is_many(output) else output
        row = self._row(tensor) if isinstance(tensor, Tensor) else None
        if row is not None:
            self.activations[name] = row.detach().clone()

    def _row(self, tensor: Tensor) -> Tensor | None:
        """What of an output belongs to the token; None where it cannot be told."""
        batch, length = self._shape
        if tensor.dim() >= 2 and tensor.shape[0] == batch and tensor.shape[1] == length:
            return tensor[self.batch_row, self.token_row]
        if tensor.dim() == 2 and tensor.shape[0] == batch * length:
            return tensor.reshape(batch, length, -1)[self.batch_row, self.token_row]
        if tensor.dim() == 3 and tensor.shape[0] == batch and self.logits_row < tensor.shape[1]:
            return tensor[self.batch_row, self.logits_row]
        return None


def _is_many(output: Any) -> bool:
    return isinstance(output, tuple | list)


@dataclass
class Comparison:
    """One way against the prompt alone at once: module names in the order of their calls, largest differences."""

    way: str
    differences: dict[str, float]

    @property
    def first(self) -> str | None:
        return next((name for name, difference in self.differences.items() if difference), None)


def compare(way: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> Comparison:
    """Modules that both have. A difference of bits alone (as of -0.0) counts as the smallest positive number."""
    differences = {}
    for name, activation in expected.items():
        other = found.get(name)
        if other is None or other.shape != activation.shape:
            continue
        same = torch.equal(activation.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        largest = float((activation.float() - other.float()).abs().max())
        differences[name] = 0.0 if same else max(largest, sys.float_info.min)
    return Comparison(way, differences)


class Paths:
    """The ways of computing one token of one model."""

    def __init__(self, model: PreTrainedModel, num_tokens: int, *, fixed_order: bool) -> None:
        self._model = model
        self._fixed_order = fixed_order
        gate = paged_gate(model, fixed_order=fixed_order)
        self.tier_reason = gate.reason
        self._shapes = gate.shapes if gate.passed else None
        generator = torch.Generator().manual_seed(0)
        vocab = model.config.get_text_config().vocab_size
        lengths = (num_tokens, num_tokens + 5, 9, 14)
        self._prompts = [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]

    def activations(self, way: str) -> dict[str, Tensor]:
        """Of the last token of the first prompt, by module. `way`: one of WAYS, or "alone"."""
        recorder = Recorder()
        handles = recorder.watch(self._model)
        try:
            if way == "padded" or self._shapes is None:
                self._padded(way, recorder)
            else:
                self._paged(way, recorder)
        finally:
            for handle in handles:
                handle.remove()
        return recorder.activations

    def _cuts(self, way: str) -> list[int]:
        total = len(self._prompts[0])
        if way == "chunks":
            return [*range(CHUNK, total, CHUNK), total]
        if way == "decode":
            return [total - 1, total]
        return list(range(1, total + 1)) if way == "tokens" else [total]

    def _paged(self, way: str, recorder: Recorder) -> None:
        prompts = self._prompts if way == "company" else self._prompts[:1]
        num_blocks = max(-(-len(prompt) // _BLOCK_SIZE) for prompt in prompts)
        cache = KVCache(len(prompts) * num_blocks * _BLOCK_SIZE, self._model.device, self._shapes)
        runner = PagedRunner(self._model, cache, _BLOCK_SIZE, fixed_order=self._fixed_order)
        sequences = [_sequence(i, prompt) for i, prompt in enumerate(prompts)]
        for index, sequence in enumerate(sequences):
            sequence.block_ids = list(range(index * num_blocks, (index + 1) * num_blocks))
        others = [ScheduledSequence(sequence, 0, sequence.num_tokens) for sequence in sequences[1:]]
        before = sum(scheduled.num_tokens for scheduled in others)
        recorder.logits_row = len(others)
        start = 0
        for end in self._cuts(way):
            recorder.token_row = before + end - start - 1
            runner.run([*others, ScheduledSequence(sequences[0], start, end - start)])
            start = end

    def _padded(self, way: str, recorder: Recorder) -> None:
        if self._shapes is not None:
            self._model.set_attn_implementation("eager")
        runner: ModelRunner = PaddedRunner(self._model, max_padded_tokens=1 << 30)
        recorder.token_row = recorder.logits_row = -1
        if way in ("padded", "company"):
            # The longer prompt comes first in its batch, so that ours is padded.
            recorder.batch_row = 1
            batch = [_sequence(i, prompt) for i, prompt in enumerate(self._prompts[:2])]
            runner.run([ScheduledSequence(sequence, 0, sequence.num_tokens) for sequence in batch])
            return
        sequence = _sequence(0, [])
        start = 0
        for end in self._cuts(way):
            sequence.token_ids += self._prompts[0][start:end]
            runner.run([ScheduledSequence(sequence, start, end - start)])
            start = end


def _sequence(sequence_id: int, token_ids: list[int]) -> EngineSequence:
    return EngineSequence(sequence_id, choice_index=0, prompt_token_ids=token_ids, sampling=_GREEDY)


def run(model: PreTrainedModel, ways: Sequence[str], *, num_tokens: int, fixed_order: bool) -> list[Comparison]:
    """Each way against the prompt alone at once. "padded" comes last: it gives the model its own attention back."""
    paths = Paths(model, num_tokens, fixed_order=fixed_order)
    expected = paths.activations("alone")
    return [compare(way, expected, paths.activations(way)) for way in sorted(ways, key=lambda way: way == "padded")]


@contextmanager
def torch_attention() -> Iterator[None]:
    """Within it the engine's attention is torch's own routine, for models without soft caps and sinks."""

    def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *, scale: float, **_: Any) -> Tensor:
        group = (-1, query.shape[1], -1, -1)
        return scaled_dot_product_attention(
            query, keys[:, None].expand(group), values[:, None].expand(group), attn_mask=visible, scale=scale
        ).float()

    before = attention.attend
    attention.attend = attend
    try:
        yield
    finally:
        attention.attend = before


def print_comparison(found: Comparison) -> None:
    table = [["module", "bits", "largest difference"]]
    for name, difference in found.differences.items():
        table.append([name, "differ" if difference else "equal", f"{difference:.3g}" if difference else ""])
    first = found.first or "none"
    result = {"benchmark": "layers", "way": found.way, "first_difference": first, "differences": found.differences}
    print(f"{found.way}: first module that differs: {first}")
    print_report(table, result)


def load_model(name: str, dtype: str) -> PreTrainedModel:
    """`name`: a directory, `pocket`, or one of SHAPES, which is made with random weights."""
    read: Callable[..., Any] = partial(
        AutoModelForCausalLM.from_pretrained, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    if name in SHAPES:
        with tempfile.TemporaryDirectory() as directory:
            write_model(Path(directory), name, dtype=dtype)
            loaded: PreTrainedModel = read(directory).eval()
            return loaded
    return read(str(resources.files("reprise") / "pocket") if name == "pocket" else name).eval()  # type: ignore[no-any-return]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pocket", help=f"a model directory, pocket, or a shape: {', '.join(SHAPES)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS[:-1]))
    parser.add_argument(
        "--attention", choices=("fixed", "torch"), default="fixed", help="torch: its own, all else fixed"
    )
    parser.add_argument("--off", action="store_true", help="as with --no-deterministic: nothing is fixed")
    parser.add_argument("--tokens", type=int, default=150, help="of the prompt (default: 150)")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (default: its own choice)")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model, arguments.dtype)
    with torch_attention() if arguments.attention == "torch" else nullcontext():
        found = run(model, arguments.ways, num_tokens=arguments.tokens, fixed_order=not arguments.off)
    for comparison in found:
        print_comparison(comparison)
    return 1 if any(comparison.first for comparison in found) else 0


if __name__ == "__main__":
    sys.exit(main())
