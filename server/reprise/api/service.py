"""What the routes share: one object a process, made by `create_app` and found under `app.state.service`."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from reprise import __version__
from reprise.api.admission import Admission
from reprise.api.errors import HttpError
from reprise.api.metrics import Metrics
from reprise.api.running import RunningRequest
from reprise.api.sampling import Served
from reprise.errors import ModelNotFoundError, UnavailableError
from reprise.generation.interface import Engine, EngineState
from reprise.ipc.messages import Ready
from reprise.settings import Settings
from reprise.text.tokenizer import Tokenizer

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

NUM_TEXT_THREADS = 2
SHUTTING_DOWN = "The server is shutting down."


class Service:
    """The engine and tokenizer with what requests of them is allowed now."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer, engine: Engine) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.engine = engine
        self.created = int(time.time())
        self._longest_token = _longest_token(tokenizer)
        self.admission = Admission(max_num_seqs=settings.max_num_seqs, max_waiting_seqs=settings.max_waiting_seqs)
        self.metrics = Metrics(engine, num_rejections=lambda: self.admission.num_rejections)
        self.running: set[RunningRequest] = set()
        self.idle = asyncio.Event()
        """Set while nothing runs."""
        self.idle.set()
        self.draining = False
        self._text_pool = ThreadPoolExecutor(NUM_TEXT_THREADS, thread_name_prefix="reprise-text")

    async def off_loop(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Call in a thread for text, so that long ones do not hold up the streams of others."""
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._text_pool, call)

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
        from_model = self.settings.generation_defaults == "model"
        return Served(
            tokenizer=self.tokenizer,
            max_sequence_tokens=info.max_sequence_tokens,
            vocab_size=info.vocab_size,
            max_choices=self.settings.max_choices,
            longest_token=self._longest_token,
            defaults=self.tokenizer.generation_defaults if from_model else {},
        )

    def add_running(self, running: RunningRequest) -> None:
        self.running.add(running)
        self.idle.clear()

    def remove_running(self, running: RunningRequest) -> None:
        running.close()
        self.running.discard(running)
        if not self.running:
            self.idle.set()

    def fail_running(self, error: Exception) -> None:
        """End everything that runs with an error."""
        for running in list(self.running):
            running.fail(error)

    def close(self) -> None:
        self._text_pool.shutdown(wait=False, cancel_futures=True)


def _longest_token(tokenizer: Tokenizer) -> int | None:
    """Bytes that one token spells at most; None where that is not known exactly."""
    spelt = tokenizer.vocabulary.token_bytes()
    return None if spelt is None else max(map(len, spelt), default=None)


def system_fingerprint(info: Ready) -> str:
    """Changes exactly when answers may: with weights, version, arithmetic."""
    facts = (info.weights_fingerprint, __version__, info.tier, info.device_name, info.dtype)
    return "fp_" + hashlib.sha256("|".join(facts).encode()).hexdigest()[:16]


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
