"""Make a model of a known shape with random weights, on this machine and without a network.

Speed depends on the shape alone, so a benchmark needs no trained weights. The tokenizer spells every id with
one to three printable ASCII characters. The output directory can be served: `reprise serve DIRECTORY`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
    },
    # Nobody's, for the ways in which a model is run that a Llama does not take.
    "tiny-experts": {
        "model_type": "mixtral",
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
        "rope_theta": 10_000.0,
    },
    "tiny-falcon": {
        "model_type": "falcon",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
        "rope_theta": 10_000.0,
    },
    "falcon-50m": {
        "model_type": "falcon",
        "hidden_size": 576,
        "num_hidden_layers": 12,
        "num_attention_heads": 9,
        "vocab_size": 16_384,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
    },
    # The shape of HuggingFaceTB/SmolLM2-135M.
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000.0,
    },
    # The shape of HuggingFaceTB/SmolLM2-1.7B.
    "smollm2-1.7b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
        "rope_theta": 130_000.0,
    },
    # The shape of Qwen/Qwen3-0.6B.
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000.0,
    },
    # The shape of meta-llama/Llama-3.1-8B, but for embeddings that are shared: a step reads the same bytes.
    "llama3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
    },
}

SPECIAL_TOKENS = ("<|end|>", "<|start|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]


def merges() -> Iterator[tuple[str, str]]:
    """Merges of a byte-pair encoding: all pairs of printable ASCII characters, then all triples."""
    characters = [chr(code) for code in range(0x21, 0x7F)]
    yield from itertools.product(characters, characters)
    for pair in itertools.product(characters, characters):
        for third in characters:
            yield "".join(pair), third


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write a byte-level BPE tokenizer of exactly this size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = byte_characters()
    chosen = list(itertools.islice(merges(), vocab_size - len(tokens) - len(SPECIAL_TOKENS)))
    vocabulary = {token: index for index, token in enumerate([*tokens, *(a + b for a, b in chosen)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=chosen))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[0],
        "bos_token": SPECIAL_TOKENS[1],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def layer_matrix_parameters(shape: str) -> int:
    """Parameters that a prompt's tokens are multiplied with, in a dense model with gated layers as Llama and Qwen3.

    The matrices of all layers: embedding and head are left out.
    """
    sizes = SHAPES[shape]
    hidden, num_heads = sizes["hidden_size"], sizes["num_attention_heads"]
    head_dim = sizes.get("head_dim", hidden // num_heads)
    attention = 2 * hidden * head_dim * (num_heads + sizes["num_key_value_heads"])
    return int(sizes["num_hidden_layers"] * (attention + 3 * hidden * sizes["intermediate_size"]))


def attention_operations(shape: str, num_tokens: int) -> int:
    """Floating-point operations of the attention over a prompt, where each token looks at those up to itself.

    Products of queries with keys and of weights with values, half of both squares, in all layers.
    """
    sizes = SHAPES[shape]
    width = sizes["num_attention_heads"] * sizes.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    return int(2 * sizes["num_hidden_layers"] * width * num_tokens**2)


def empty_model(shape: str) -> PreTrainedModel:
    """A model of this shape with the weights that its class starts with, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(SHAPES[shape])
    end, start = sizes["vocab_size"] - 2, sizes["vocab_size"] - 1
    config = AutoConfig.for_model(
        sizes.pop("model_type"),
        rope_parameters={"rope_type": "default", "rope_theta": sizes.pop("rope_theta")},
        **sizes,
        tie_word_embeddings=True,
        eos_token_id=end,
        bos_token_id=start,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    return model


def write_model(directory: Path, shape: str, *, dtype: str = "bfloat16", seed: int = 0) -> int:
    """Write configuration, random weights and tokenizer. Returns the number of parameters."""
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, SHAPES[shape]["vocab_size"])
    torch.manual_seed(seed)
    model: Any = empty_model(shape)
    model.to(getattr(torch, dtype))
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def write_pair(
    directory: Path,
    draft_directory: Path,
    shape: str,
    *,
    later: float,
    num_draft_layers: int = 1,
    dtype: str = "bfloat16",
) -> None:
    """Write a model, and a draft model that is its first layers, with the embeddings and the head of both.

    later: what the outputs of all further layers are multiplied by: the smaller, the more often both say the same.
    """
    import torch

    for path in (directory, draft_directory):
        path.mkdir(parents=True, exist_ok=True)
        write_tokenizer(path, SHAPES[shape]["vocab_size"])
    torch.manual_seed(0)
    model: Any = empty_model(shape)
    with torch.no_grad():
        for layer in model.model.layers[num_draft_layers:]:
            layer.self_attn.o_proj.weight *= later
            layer.mlp.down_proj.weight *= later
    model.to(getattr(torch, dtype))
    model.save_pretrained(directory)
    model.model.layers = model.model.layers[:num_draft_layers]
    model.config.num_hidden_layers = len(model.model.layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:num_draft_layers]
    model.save_pretrained(draft_directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path, help="where to write it, such as runs/smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    arguments = parser.parse_args()
    num_parameters = write_model(arguments.directory, arguments.shape, dtype=arguments.dtype)
    print(f"{arguments.directory}: {arguments.shape}, {num_parameters:,} parameters, {arguments.dtype}")


if __name__ == "__main__":
    main()
