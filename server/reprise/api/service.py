"""What the routes share: one object a process, made by `create_app` and found under `app.state.service`."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Mapping

from reprise.api.admission import Admission
from reprise.api.errors import HttpError
from reprise.api.metrics import Metrics
from reprise.api.recording import recorder
from reprise.api.retention import Generations
from reprise.api.sampling import Served
from reprise.api.text_threads import TextThreads
from reprise.errors import ModelNotFoundError, UnavailableError
from reprise.generation.interface import Engine, EngineState
from reprise.ipc.messages import Ready
from reprise.replay.facts import ServedModel, ServedText, system_fingerprint
from reprise.replay.store import BundleStore
from reprise.settings import Settings
from reprise.text.tokenizer import Tokenizer

NUM_TEXT_THREADS = 2
NUM_TOKEN_THREADS = 1
MAX_TOKEN_REQUESTS = 16
"""Requests of /tokenize and /detokenize that are in the server at once."""
MAX_BUNDLE_LOADS = 2
"""Bundles that are read and decoded at once, for replay."""
SHUTTING_DOWN = "The server is shutting down."


class Service:
    """The engine and tokenizer with what requests of them is allowed now."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer, engine: Engine) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.engine = engine
        self.created = int(time.time())
        from_model = settings.generation_defaults == "model"
        self.text = served_text(tokenizer, tokenizer.generation_defaults if from_model else {})
        self._longest_token = _longest_token(tokenizer)
        self.admission = Admission(max_num_seqs=settings.max_num_seqs, max_waiting_seqs=settings.max_waiting_seqs)
        self.generations = Generations(max_entries=settings.max_retained_tokens, timeout=settings.request_timeout)
        self.metrics = Metrics(engine, num_rejections=lambda: self.admission.num_rejections)
        self.bundles: BundleStore | None = None
        """Where responses are recorded, if they are."""
        if settings.bundle_dir is not None:
            self.bundles = store = BundleStore(settings.bundle_dir, max_bundles=settings.max_bundles)
            self.generations.on_begin.append(recorder(store, settings, engine, self.text))
            self.metrics.count("bundles_written", "Bundles written.", lambda: store.num_written)
            self.metrics.count("bundles_failed", "Bundles that could not be written.", lambda: store.num_failed)
        self.bundle_loads = asyncio.Semaphore(MAX_BUNDLE_LOADS)
        generations, metrics = self.generations, self.metrics
        metrics.gauge("kept_generations", "Generations that nobody reads.", lambda: generations.num_kept)
        metrics.count("attached_streams", "Streams resumed from what is held.", lambda: generations.num_attached)
        metrics.count("recomputed_streams", "Streams resumed by computing again.", lambda: generations.num_recomputed)
        metrics.count("joined_requests", "Requests that repeated an Idempotency-Key.", lambda: generations.num_joined)
        self.draining = False
        self.text_threads = TextThreads(NUM_TEXT_THREADS)
        """For generation, which `admission` bounds."""
        self.token_threads = TextThreads(NUM_TOKEN_THREADS, limit=MAX_TOKEN_REQUESTS)
        """For the endpoints that only turn text into tokens, so that no generation waits for them."""

    def check_available(self) -> Ready:
        """What is loaded. Raises UnavailableError or HttpError 503 where new work cannot be taken."""
        state, info = self.engine.state, self.engine.info
        if self.draining:
            headers = {"retry-after": "5", "connection": "close"}
            raise HttpError(503, SHUTTING_DOWN, code="service_unavailable", headers=headers)
        if state in (EngineState.FAILED, EngineState.STOPPED):
            raise UnavailableError(f"the engine is {state.value}", retry_after=5)
        if info is None:
            raise UnavailableError("the model is still loading", retry_after=5)
        return info

    def model_name(self, asked: str | None) -> str:
        """The served name that a request means. Raises ModelNotFoundError."""
        names = self.settings.model_names
        if asked is None or asked in names:
            return asked or names[0]
        shown = asked if len(asked) <= 128 else asked[:128] + "…"
        known = ", ".join(f"'{name}'" for name in names)
        raise ModelNotFoundError(f"The model '{shown}' is not served here. Served: {known}.")

    def served(self, info: Ready) -> Served:
        """What requests are judged by."""
        return Served(
            tokenizer=self.tokenizer,
            max_sequence_tokens=info.max_sequence_tokens,
            vocab_size=info.vocab_size,
            max_choices=self.settings.max_choices,
            longest_token=self._longest_token,
            defaults=self.text.generation_defaults,
        )

    def fingerprint(self, info: Ready) -> str:
        return system_fingerprint(ServedModel.of(info), self.text)

    def begin_drain(self) -> None:
        """Take no new work, and keep nothing that nobody waits for."""
        self.draining = True
        self.generations.drain()

    def close(self) -> None:
        """End the threads.

        In an event loop the last bundles are written beside it: its own end, `shutdown_default_executor`, waits for
        them, while signals are heard and the engine is stopped.
        """
        self.text_threads.close()
        self.token_threads.close()
        if self.bundles is None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.bundles.close()
        else:
            loop.run_in_executor(None, self.bundles.close)


def _longest_token(tokenizer: Tokenizer) -> int | None:
    """Bytes that one token spells at most; None where that is not known exactly."""
    spelt = tokenizer.vocabulary.token_bytes()
    return None if spelt is None else max(map(len, spelt), default=None)


def served_text(tokenizer: Tokenizer, defaults: Mapping[str, float | int]) -> ServedText:
    """The facts of texts. defaults: the sampling fields that hold where a request leaves them out."""
    template = tokenizer.chat_template_source
    return ServedText(
        tokenizer_fingerprint=tokenizer.fingerprint,
        end_token_ids=tokenizer.end_token_ids,
        start_token_ids=tuple(tokenizer.start_token_ids),
        chat_template_fingerprint=None if template is None else _digest(template),
        generation_defaults=dict(defaults),
    )


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
