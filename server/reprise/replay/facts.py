"""What answers follow from, besides the request: fact by fact, and as one fingerprint."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib import metadata

import msgspec

from reprise import __version__
from reprise.ipc.messages import Ready

NO_CAUSE = frozenset({"python", "tier_reason", "deterministic_reason"})
"""Facts that no bit depends on."""
_OF_REQUESTS = ("start_token_ids", "chat_template_fingerprint", "generation_defaults")
"""Facts of texts that a request is made by, and that nothing depends on once it is recorded."""


class Software(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Versions of what computes, and of what makes prompts."""

    reprise: str
    python: str
    torch: str
    transformers: str
    tokenizers: str
    jinja2: str


class ServedModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was loaded, in the engine's own words."""

    architecture: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    max_sequence_tokens: int
    tier: str
    tier_reason: str
    kernels: str
    device: str
    device_name: str
    dtype: str
    weights_fingerprint: str
    model_config_fingerprint: str
    deterministic: bool
    deterministic_reason: str
    numerics_fingerprint: str

    @classmethod
    def of(cls, info: Ready) -> ServedModel:
        return cls(**{name: getattr(info, name) for name in cls.__struct_fields__})


class ServedText(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What makes texts into tokens, tokens into texts, and parameters of what a request leaves out."""

    tokenizer_fingerprint: str
    end_token_ids: tuple[int, ...]
    start_token_ids: tuple[int, ...]
    chat_template_fingerprint: str | None
    generation_defaults: dict[str, float | int]

    def with_requests_of(self, recorded: ServedText) -> ServedText:
        """These facts, but those that requests were made by as they were when one was recorded."""
        return msgspec.structs.replace(self, **{name: getattr(recorded, name) for name in _OF_REQUESTS})


@cache
def software() -> Software:
    """Of this process; the engine's has the same."""
    names = ("torch", "transformers", "tokenizers", "jinja2")
    versions = {name: metadata.version(name) for name in names}
    return Software(reprise=__version__, python=platform.python_version(), **versions)


def system_fingerprint(model: ServedModel, text: ServedText) -> str:
    """Changes exactly when answers may: with any of the facts that a bit may depend on."""
    parts: tuple[msgspec.Struct, ...] = (software(), model, text)
    facts = {name: getattr(part, name) for part in parts for name in part.__struct_fields__ if name not in NO_CAUSE}
    return "fp_" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
