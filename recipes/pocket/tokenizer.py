"""The tokenizers of the two presets, and pocket's chat template."""

from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD = "<|pad|>"
BEGIN = "<|begin|>"
END = "<|end|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
SPECIAL_TOKENS = [PAD, BEGIN, END, *ROLES.values()]

# `developer` is OpenAI's newer name for `system`; any role that pocket does not know speaks as the user.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role in ["system", "developer"] -%}<|system|>
    {%- elif message.role == "assistant" -%}<|assistant|>
    {%- else -%}<|user|>
    {%- endif -%}
    {{- (message.content or "") | trim -}}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""

# One Chinese character, one digit, a word with the space before it, signs, or white space. Merges never
# cross these, so a character or a digit is the same tokens in every context.
PIECES = r"\p{Han}|\p{N}| ?[\p{L}&&[^\p{Han}]]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def add_begin(tokenizer: Tokenizer, begin: str) -> None:
    """Put `begin` before a plain text. The chat template writes it itself."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A $B",
        special_tokens=[(begin, tokenizer.token_to_id(begin))],
    )


def wrap(tokenizer: Tokenizer, **fields: str) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers saves and loads it."""
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **fields
    )
    assert isinstance(wrapped, PreTrainedTokenizerFast)  # noqa: S101
    return wrapped


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: common words are one token, and any bytes can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    add_begin(tokenizer, BEGIN)
    return wrap(tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE)


def character_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """One token for each character of the text; a character that is not in it becomes `<unk>`."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*special, *sorted(set(text))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    add_begin(tokenizer, "<bos>")
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    return wrap(tokenizer, **dict(zip(names, special, strict=True)))


def encode_pieces(
    tokenizer: PreTrainedTokenizerFast, pieces: Sequence[tuple[str, float]]
) -> tuple[list[int], list[float]]:
    """Token ids of pieces of text, and for each token the weight of its piece in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in pieces:
        piece = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        weights += [weight] * len(piece)
    return ids, weights
