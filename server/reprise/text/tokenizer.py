"""A model's tokenizer: text to ids, messages to ids, and what each id spells."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reprise.errors import InvalidRequestError, ModelLoadError
from reprise.text.chat import ChatTemplate
from reprise.text.control_tokens import ControlTokens
from reprise.text.model_files import check_model_place, generation_defaults_in, read_model_json, token_ids_in
from reprise.text.spelling import Speller, candidate_spellers, speller_for
from reprise.text.template_trial import try_template
from reprise.text.vocabulary import Vocabulary, build_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerBase


class Tokenizer:
    """Thread safe: nothing of it changes after `load`.

    `end_token_ids` end an answer; `start_token_ids` stand for the empty prompt; `generation_defaults` are the
    sampling parameters that the model's own `generation_config.json` sets. `fingerprint` is a digest of what texts
    and ids are made of each other by.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        generation_config: dict[str, Any] | None = None,
        model_config: dict[str, Any] | None = None,
    ) -> None:
        """Wrap a transformers tokenizer; `load` is the usual way.

        chat_template: replaces the tokenizer's own. The configs are the contents of `generation_config.json`
        and `config.json`. Raises ModelLoadError for a chat template that cannot be used.
        """
        self._tokenizer = tokenizer
        self._backend: Backend | None = getattr(tokenizer, "backend_tokenizer", None)
        self._lock = threading.Lock()
        if self._backend is not None:
            # otherwise encode would have to switch them off each time, in a backend that threads share
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = False
        self.vocabulary = self._build_vocabulary()
        self._control_tokens = ControlTokens(tokenizer.added_tokens_decoder, self._backend, tokenizer.unk_token_id)
        self._chat_template = self._build_chat_template(chat_template)
        self.fingerprint = self._fingerprint()

        generation_config = generation_config or {}
        configs = [generation_config, model_config or {}, (model_config or {}).get("text_config") or {}]
        ends = [*token_ids_in(configs, "eos_token_id"), *_one(tokenizer.eos_token_id)]
        starts = [*_one(tokenizer.bos_token_id), *token_ids_in(configs, "bos_token_id")]
        self.end_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        self.bos_token_id: int | None = starts[0] if starts else None
        self.start_token_ids: list[int] = starts[:1] or ends[:1]
        self.generation_defaults: dict[str, float | int] = generation_defaults_in(generation_config)

    @classmethod
    def load(cls, model: str, *, revision: str | None = None, chat_template: str | None = None) -> Tokenizer:
        """The tokenizer of a model directory or Hugging Face repository.

        chat_template: the text of a template that replaces the model's own. Code from a repository is never
        run. Raises ModelLoadError. Where torch is installed, transformers imports it here: see `torch_free`.
        """
        from transformers import AutoTokenizer

        check_model_place(model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        except Exception as error:  # converters raise whatever the file's fault provokes
            raise ModelLoadError(_load_failure(model, revision, error)) from error
        return cls(
            tokenizer,
            chat_template=chat_template,
            generation_config=read_model_json(model, "generation_config.json", revision=revision),
            model_config=read_model_json(model, "config.json", revision=revision),
        )

    @property
    def chat_template_source(self) -> str | None:
        """The Jinja text that messages are rendered by."""
        return None if self._chat_template is None else self._chat_template.source

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text in which special tokens are written as they are (`<|end|>` in it is that token).

        Other Python threads go on meanwhile.
        """
        if self._backend is None:
            with self._lock:
                return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        # a batch of one: the backend's `encode` holds the interpreter lock, its batch methods do not
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The tokenizer's own decoding of a whole text: a leading space may be stripped. Unknown ids spell nothing."""
        ids = [i for i in token_ids if 0 <= i < self.vocabulary.size]
        decoded = self._tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(decoded)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """Messages as the one text that the model's chat template makes of them, start token included.

        To generate from messages use `encode_chat`: in this text a control token that a user wrote about
        looks like the template's own. Raises InvalidRequestError.
        """
        template = self._require_chat_template()
        return template.render(
            template.normalize(messages),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> list[int]:
        """The ids of `render_chat`'s text, but special tokens that the messages spell are plain text.

        Raises InvalidRequestError.
        """
        template = self._require_chat_template()
        marked = template.render(
            self._control_tokens.mark(template.normalize(messages)),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=self._control_tokens.mark(template_kwargs),
        )
        return self._control_tokens.encode(marked, lambda text: self.encode(text, add_special_tokens=False))

    def _require_chat_template(self) -> ChatTemplate:
        if self._chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template, so messages cannot be made into a prompt. Use /v1/completions, or "
                "start the server with --chat-template FILE.",
                param="messages",
            )
        return self._chat_template

    def _build_chat_template(self, override: str | None) -> ChatTemplate | None:
        if override is None and self._tokenizer.chat_template is None:
            return None
        try:
            source = self._tokenizer.get_chat_template() if override is None else override
        except ValueError as error:
            raise ModelLoadError(f"None of the model's chat templates is its default: {error}") from error
        try_template(source, dict(self._tokenizer.special_tokens_map))
        return ChatTemplate(self._tokenizer, source)

    def _build_vocabulary(self) -> Vocabulary:
        vocabulary = self._tokenizer.get_vocab()
        pieces: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for piece, token_id in vocabulary.items():
            pieces[token_id] = piece
        added = self._tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special}
        if self._backend is None:
            special |= set(self._tokenizer.all_special_ids)
        return build_vocabulary(
            pieces,
            {i: token.content for i, token in added.items()},
            special,
            self._spellers(),
            lambda text: self.encode(text, add_special_tokens=False),
            self._decode_text,
        )

    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        # templates use these, which the backend knows as any others
        digest.update(json.dumps(self._tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
        if self._backend is not None:
            digest.update(self._backend.to_str().encode())
            return digest.hexdigest()
        tokenizer = self._tokenizer
        added = {i: repr(token) for i, token in tokenizer.added_tokens_decoder.items()}
        marks = self.encode("", add_special_tokens=True)
        facts = [type(tokenizer).__qualname__, tokenizer.get_vocab(), added, marks]
        digest.update(json.dumps(facts, sort_keys=True).encode())
        for name in sorted(tokenizer.vocab_files_names):
            file = tokenizer.init_kwargs.get(name)
            if file is not None and Path(file).is_file():
                digest.update(Path(file).read_bytes())
        return digest.hexdigest()

    def _spellers(self) -> list[Speller]:
        if self._backend is None:
            return candidate_spellers()
        decoder = self._backend.decoder
        description = None if decoder is None else json.loads(decoder.__getstate__())
        speller = speller_for(description)
        return [] if speller is None else [speller]

    def _decode_text(self, token_ids: Sequence[int]) -> str:
        decoded = self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded)


def _one(token_id: int | None) -> list[int]:
    return [] if token_id is None else [token_id]


def _load_failure(model: str, revision: str | None, error: Exception) -> str:
    where = repr(model) if revision is None else f"{model!r} at revision {revision!r}"
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return f"The tokenizer of model {where} cannot be loaded: {reason}."
