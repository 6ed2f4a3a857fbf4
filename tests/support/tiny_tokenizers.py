"""Small real tokenizers of every kind that causal language models come with, trained here in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Stop here, or stop there!",
    "def main():\n    return [x ** 2 for x in range(10)]",
    "你好，世界。北京是中国的首都。今天天气很好！",
    "Smileys 🙂 and families 👩🏽‍🚀, flags 🇩🇪, accents e\u0301 and ä.",
] * 3

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        show_progress=False, vocab_size=420, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _sentence_piece_decoder() -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(steps)


def sentence_piece_bpe() -> Backend:
    """As Llama 2: byte fallback, `▁` put before the text by the normalizer."""
    trained = Backend(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trained.train_from_iterator(
        CORPUS[:2], trainers.BpeTrainer(show_progress=False, vocab_size=200, special_tokens=SPECIAL_TOKENS)
    )
    description = json.loads(trained.to_str())
    pieces = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *description["model"]["vocab"]]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in description["model"]["merges"]]
    backend = Backend(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = _sentence_piece_decoder()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return backend


def unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        show_progress=False, vocab_size=150, special_tokens=SPECIAL_TOKENS, unk_token="<unk>"
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def characters() -> Backend:
    """As the recipe's `chars` preset: every character a token."""
    alphabet = sorted({character for line in CORPUS for character in line})
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return backend


def word_suffix() -> Backend:
    """As GPT-1: `</w>` ends a word."""
    backend = Backend(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        show_progress=False, vocab_size=250, special_tokens=SPECIAL_TOKENS, end_of_word_suffix="</w>"
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_piece() -> Backend:
    """As BERT, with the clean-up of spaces that makes its pieces spell different bytes in different company."""
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(show_progress=False, vocab_size=300, special_tokens=SPECIAL_TOKENS)
    )
    return backend


BUILDERS: dict[str, Callable[[], Backend]] = {
    "byte_level": byte_level,
    "sentence_piece_bpe": sentence_piece_bpe,
    "unigram": unigram,
    "characters": characters,
    "word_suffix": word_suffix,
    "word_piece": word_piece,
}


def save_model(
    directory: Path,
    backend: Backend,
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    generation_config: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **tokenizer_config: Any,
) -> Path:
    """Write the files that a model directory has next to its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    written: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
    } | tokenizer_config
    if chat_template is not None:
        written["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(written))
    if generation_config is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation_config))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def add_start_token(backend: Backend) -> Backend:
    """Make `encode(…, add_special_tokens=True)` begin with `<s>`."""
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return backend
