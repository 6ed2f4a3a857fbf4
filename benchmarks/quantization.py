"""What --quantize costs in exactness and gives in speed, on the native decoder, without processes and HTTP.

  perplexity         of the bundled model over the answers in conversations as its recipe draws them, with a seed that
                     its training did not have; their wordings it knows
  logit error        on models with random weights, over random tokens: how far logits are from those of the weights as
                     they are, as a share of what they vary by; nothing corrects errors there, as training would
  tokens a second    of decoding so many sequences together

All three are loaded and take turns; the shortest time of each counts.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.report import print_report
from benchmarks.shapes import SHAPES, write_model
from benchmarks.steps import seconds_a_step
from recipes.pocket.conversations import training_texts
from reprise.engine.core import EngineCore
from reprise.engine.loader import LoadedModel, load
from reprise.engine.process import build_core
from reprise.engine.scheduler import ScheduledSequence
from reprise.engine.sequence import Sequence as TokenSequence
from reprise.ipc.messages import EngineConfig
from reprise.types import SamplingParams

KV_CACHE_BYTES = 1 << 28
CONVERSATIONS_SEED = 1_000_003
SCORED = SamplingParams(seed=0, max_tokens=0, num_prompt_logprobs=0)


def logits(loaded: LoadedModel, token_ids: list[int]) -> Tensor:
    """Of every position [tokens, vocab]."""
    sequence = TokenSequence(0, choice_index=0, prompt_token_ids=token_ids, sampling=SCORED)
    sequence.block_ids = list(range(-(-len(token_ids) // loaded.block_size)))
    return loaded.runner.run([ScheduledSequence(sequence, 0, len(token_ids))]).clone()


def conversations(num_tokens: int) -> list[tuple[list[int], list[float]]]:
    """Token ids and the weight of each, about so many tokens in all."""
    tokenizer = Tokenizer.from_file(str(resources.files("reprise") / "pocket" / "tokenizer.json"))
    drawn: list[tuple[list[int], list[float]]] = []
    for pieces in training_texts(CONVERSATIONS_SEED, lambda pieces: sum(len(text) for text, _ in pieces) < 400):
        ids, weights = [], []
        for text, weight in pieces:
            new = tokenizer.encode(text, add_special_tokens=False).ids
            ids += new
            weights += [weight] * len(new)
        drawn.append((ids, weights))
        num_tokens -= len(ids)
        if num_tokens <= 0:
            break
    return drawn


def perplexity(loaded: LoadedModel, texts: Sequence[tuple[list[int], list[float]]]) -> float:
    """E to the mean loss of the tokens that count in full, as an answer's do."""
    losses = []
    for ids, weights in texts:
        of_next = torch.nn.functional.cross_entropy(
            logits(loaded, ids)[:-1], torch.tensor(ids[1:], dtype=torch.int64), reduction="none"
        )
        losses.append(of_next[torch.tensor(weights[1:]) == 1])
    return math.exp(float(torch.cat(losses).mean()))


def error(found: Tensor, reference: Tensor) -> float:
    """Mean over positions, as a share of what the logits vary by."""
    centred = reference - reference.mean(-1, keepdim=True)
    return float(((found - reference).norm(dim=-1) / centred.norm(dim=-1)).mean())


def load_formats(directory: str, dtype: Literal["bfloat16", "float32"]) -> dict[str, LoadedModel]:
    return {
        quantize: load(
            EngineConfig(
                model=directory, device="cpu", dtype=dtype, kernels="native", quantize=quantize,
                kv_cache_memory=KV_CACHE_BYTES, max_model_len=1024,
            ),
            lambda _stage, _share: None,
        )
        for quantize in ("none", "int8", "int4")
    }  # fmt: skip


def measure(model: str, directory: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry for each format."""
    loaded = load_formats(directory, options.dtype)
    ids = torch.randint(0, loaded["none"].ready.vocab_size, (256,), generator=torch.Generator().manual_seed(1)).tolist()
    reference = logits(loaded["none"], ids)
    texts = conversations(options.tokens) if model == "pocket" else []
    cores: dict[str, EngineCore] = {name: build_core(one, None) for name, one in loaded.items()}
    rates: dict[str, dict[int, float]] = {name: {} for name in cores}
    first_id = 1
    for count in options.sequences:
        for _ in range(options.repeats):
            for name, core in cores.items():
                seconds = seconds_a_step(core, first_id, count, 20, options.new_tokens)
                rates[name][count] = max(rates[name].get(count, 0.0), count / seconds)
                first_id += count
    return [
        {
            "model": model,
            "quantize": name,
            "kernels": one.ready.kernels,
            "perplexity": perplexity(one, texts) if texts else None,
            "logit_error": error(logits(one, ids), reference),
            "tokens_per_second": rates[name],
        }
        for name, one in loaded.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", nargs="+", default=["pocket", "smollm2-135m"], choices=("pocket", *SHAPES),
        help="pocket, and shapes that are made with random weights: %(choices)s", metavar="NAME",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=20_000, help="of the conversations (default: %(default)s)")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    rates = [f"tokens/s, {count}" for count in options.sequences]
    table = [["model", "quantize", "perplexity", "logit error", *rates]]
    results: list[dict[str, Any]] = []
    for model in options.model:
        with TemporaryDirectory() as made:
            directory = str(resources.files("reprise") / "pocket")
            if model != "pocket":
                write_model(Path(made), model, dtype=options.dtype)
                directory = made
            for result in measure(model, directory, options):
                results.append(result)
                shown = "" if result["perplexity"] is None else f"{result['perplexity']:.3f}"
                speeds = [f"{result['tokens_per_second'][count]:.1f}" for count in options.sequences]
                table.append([model, result["quantize"], shown, f"{result['logit_error']:.4f}", *speeds])
    print_report(table, {"benchmark": "quantization", "threads": torch.get_num_threads(), "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
