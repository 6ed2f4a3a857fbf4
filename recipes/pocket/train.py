"""Train the bundled model `pocket`, or with `--preset chars` the smallest model that one can serve.

python -m recipes.pocket.train --preset pocket --output DIR
python -m recipes.pocket.train --preset chars --text FILE --output DIR
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.pocket.conversations import Pieces, training_texts
from recipes.pocket.tokenizer import character_tokenizer, encode_pieces, train_byte_level_bpe

SEED = 20
VOCAB_SIZE = 4096
CONTEXT = 2048
# Texts that the byte-level BPE is trained on.
NUM_TOKENIZER_TEXTS = 20_000
BATCH_TOKENS = 2048
# Texts that are sorted by length together, so that a batch needs little padding.
POOL = 1024

CHARS_TEXT = Path(__file__).parent / "text" / "chars.txt"
CHARS_CONTEXT = 512
CHARS_BATCH = 4
CHARS_STEPS = 200


def pocket_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def chars_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CHARS_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def num_parameters(model: LlamaForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class Batch:
    """Token ids padded on the right, and the weight of each token as a target."""

    def __init__(self, rows: list[tuple[list[int], list[float]]], pad_token_id: int) -> None:
        length = max(len(ids) for ids, _ in rows)
        self.input_ids = torch.tensor([ids + [pad_token_id] * (length - len(ids)) for ids, _ in rows])
        self.weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in rows])
        self.num_tokens = sum(len(ids) for ids, _ in rows)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """Training batches of about BATCH_TOKENS tokens; texts of like length share one."""

    def fits(pieces: Pieces) -> bool:
        if sum(len(text.encode()) for text, _ in pieces) < CONTEXT:
            return True
        return len(encode_pieces(tokenizer, pieces)[0]) <= CONTEXT

    pad_token_id = tokenizer.pad_token_id
    assert isinstance(pad_token_id, int)  # noqa: S101
    rng = random.Random(seed)
    texts = training_texts(seed, fits)
    while True:
        pool = [encode_pieces(tokenizer, pieces) for pieces in itertools.islice(texts, POOL)]
        pool.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for row in pool:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            yield Batch(group, pad_token_id)


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Cross entropy of the next token, where the target has a weight."""
    hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    weights = batch.weights[:, 1:]
    chosen = weights > 0
    logits = model.lm_head(hidden[:, :-1][chosen]).float()
    losses = functional.cross_entropy(logits, batch.input_ids[:, 1:][chosen], reduction="none")
    return (losses * weights[chosen]).sum() / weights.sum()


def schedule(progress: float) -> float:
    """The learning rate as a share of its peak: a short warm-up, then down to nothing along a cosine."""
    warm_up = 0.02
    if progress < warm_up:
        return max(progress, 1e-3) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warm_up) / (1 - warm_up))


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for the embeddings and norms.

    AdamW alone needs several times the tokens here.
    """

    def __init__(self, model: LlamaForCausalLM, matrix_rate: float, other_rate: float) -> None:
        self.parameters = list(model.parameters())
        embeddings = model.get_input_embeddings().weight
        matrices = [p for p in self.parameters if p.dim() == 2 and p is not embeddings]
        others = [p for p in self.parameters if p.dim() != 2 or p is embeddings]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
                matrix_rate,
            ),
            (
                torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
                other_rate,
            ),
        ]

    def step(self, loss: torch.Tensor, share: float) -> None:
        """One step down the loss, at a share of the peak learning rates."""
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, rate in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path, dtype: torch.dtype) -> None:
    """Write the directory that `reprise serve` and transformers load."""
    output.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def train_pocket(output: Path, num_tokens: int, minutes: float, *, bfloat16: bool) -> None:
    begin = time.monotonic()
    torch.manual_seed(SEED)
    texts = itertools.islice(training_texts(SEED, lambda _: True), NUM_TOKENIZER_TEXTS)
    tokenizer = train_byte_level_bpe((text for pieces in texts for text, weight in pieces if weight), VOCAB_SIZE)
    model = LlamaForCausalLM(pocket_config(tokenizer))
    print(f"tokenizer of {len(tokenizer)} tokens after {time.monotonic() - begin:.0f} s", flush=True)
    print(f"model of {num_parameters(model):,} parameters", flush=True)
    optimizer = Optimizer(model, matrix_rate=0.008, other_rate=0.003)
    model.train()
    seen = 0
    smooth = math.log(len(tokenizer))
    start = time.monotonic()
    for number, batch in enumerate(batches(tokenizer, SEED + 1)):
        elapsed = time.monotonic() - start
        progress = max(seen / num_tokens, elapsed / (minutes * 60))
        if progress >= 1:
            break
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = weighted_loss(model, batch)
        optimizer.step(loss, schedule(progress))
        seen += batch.num_tokens
        smooth += (loss.item() - smooth) * max(0.01, 1 / (number + 1))
        if number % 50 == 0:
            left = elapsed / progress * (1 - progress) if progress else float("nan")
            print(
                f"step {number} loss {smooth:.3f} tokens {seen:,} {seen / max(elapsed, 1e-9):,.0f} tokens/s"
                f" elapsed {elapsed / 60:.1f} min left {left / 60:.1f} min",
                flush=True,
            )
    model.train(mode=False)
    save(model, tokenizer, output, torch.bfloat16)
    print(
        json.dumps(
            {
                "preset": "pocket",
                "parameters": num_parameters(model),
                "vocabulary": len(tokenizer),
                "tokens_seen": seen,
                "final_loss": round(smooth, 4),
                "minutes": round((time.monotonic() - begin) / 60, 1),
                "megabytes": round(sum(file.stat().st_size for file in output.iterdir()) / 1e6, 2),
            }
        )
    )


def train_chars(output: Path, text: str, num_steps: int) -> None:
    """Learn one short text by heart: windows of it that begin anywhere."""
    begin = time.monotonic()
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = character_tokenizer(text)
    model = LlamaForCausalLM(chars_config(tokenizer))
    print(f"model of {num_parameters(model):,} parameters, text of {len(text)} characters", flush=True)
    optimizer = Optimizer(model, matrix_rate=0.008, other_rate=0.003)
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    pad_token_id = tokenizer.pad_token_id
    assert isinstance(pad_token_id, int)  # noqa: S101
    smooth = math.log(len(tokenizer))
    for number in range(num_steps):
        rows: list[tuple[list[int], list[float]]] = []
        for _ in range(CHARS_BATCH):
            # A quarter of the windows begin at the beginning.
            first = max(0, rng.randrange(-len(ids) // 3, max(1, len(ids) - CHARS_CONTEXT // 8)))
            window = ids[first : first + CHARS_CONTEXT]
            rows.append((window, [1.0] * len(window)))
        loss = weighted_loss(model, Batch(rows, pad_token_id))
        optimizer.step(loss, schedule(number / num_steps))
        smooth += (loss.item() - smooth) * max(0.05, 1 / (number + 1))
        if number % 50 == 0:
            print(f"step {number} loss {smooth:.3f} elapsed {time.monotonic() - begin:.1f} s", flush=True)
    model.train(mode=False)
    save(model, tokenizer, output, torch.float32)
    print(
        json.dumps(
            {
                "preset": "chars",
                "parameters": num_parameters(model),
                "characters": len(text),
                "vocabulary": len(tokenizer),
                "final_loss": round(smooth, 4),
                "seconds": round(time.monotonic() - begin, 1),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("pocket", "chars"), default="pocket")
    parser.add_argument("--output", type=Path, required=True, help="the directory to write")
    parser.add_argument("--text", type=Path, default=CHARS_TEXT, help="chars: the text to learn")
    parser.add_argument("--steps", type=int, default=CHARS_STEPS, help="chars: training steps")
    parser.add_argument("--tokens", type=int, default=6_500_000, help="pocket: tokens to train on")
    parser.add_argument("--minutes", type=float, default=55, help="pocket: the longest time to train")
    parser.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="pocket: compute in bfloat16 where it is safe; without it slower on CPUs that have bfloat16",
    )
    arguments = parser.parse_args()
    if arguments.preset == "chars":
        train_chars(arguments.output, arguments.text.read_text(encoding="utf-8"), arguments.steps)
    else:
        train_pocket(arguments.output, arguments.tokens, arguments.minutes, bfloat16=arguments.bfloat16)


if __name__ == "__main__":
    main()
