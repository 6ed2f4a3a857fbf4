"""An engine that says what a test tells it to."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence

from reprise.errors import UnavailableError
from reprise.generation.interface import EngineState
from reprise.generation.request_stream import RequestStream
from reprise.ipc.messages import EngineStats, LoadProgress, Ready
from reprise.text.tokenizer import Tokenizer
from reprise.types import ChoiceDelta, FinishReason, GenerationRequest, LogprobEntry, LogprobToken

Item = ChoiceDelta | list[ChoiceDelta] | Exception | asyncio.Event
"""A delta to give, several to give before anybody can read one, an error to raise, or something to wait for."""

READY = Ready(
    tier="paged",
    tier_reason="the check at load found equal logits",
    device="cpu",
    device_name="test",
    dtype="float32",
    architecture="LlamaForCausalLM",
    num_parameters=430_000,
    vocab_size=512,
    max_model_len=256,
    num_kv_tokens=4096,
    kv_cache_memory=2**20,
    max_sequence_tokens=256,
    max_num_seqs=64,
    weights_fingerprint="0123456789abcdef",
    load_seconds=0.5,
    deterministic=True,
    deterministic_reason="the check at load found equal bits",
    numerics_fingerprint="feedbeef",
)


class ScriptedStream(RequestStream):
    """Gets its script's items, then ends, complete or not; a script of None waits until it is closed."""

    def __init__(self, request: GenerationRequest, items: Iterable[Item] | None) -> None:
        super().__init__(request, self._stop)
        self._playing = asyncio.create_task(self._play(items))

    def _stop(self, _: RequestStream) -> None:
        self._playing.cancel()

    async def _play(self, items: Iterable[Item] | None) -> None:
        if items is None:
            return
        for item in items:
            # Let others run, as a real engine would.
            await asyncio.sleep(0)
            if isinstance(item, ChoiceDelta | list):
                for delta in item if isinstance(item, list) else [item]:
                    self.put(delta)
            elif isinstance(item, Exception):
                self.fail(item)
                return
            else:
                await item.wait()
        if not self.finished:
            self.close()


class ScriptedEngine:
    """Implements `generation.interface.Engine`. Each submitted request takes the next script; without one it is
    answered with `answer`, in one delta a token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.state = EngineState.READY
        self.info: Ready | None = READY
        self.stats = EngineStats()
        self.load_progress: LoadProgress | None = None
        self.last_progress = time.monotonic()
        self.last_heartbeat = self.last_progress
        self.num_restarts = 0
        self.num_hung = 0
        self.num_recovered = 0
        self.num_lost = 0
        self.num_convicted = 0
        self.num_dropped = 0
        self.num_failed: dict[str, int] = {}
        self.last_recovery_seconds = 0.0
        self.answer = "Hello, world!"
        self.requests: list[GenerationRequest] = []
        self.streams: list[ScriptedStream] = []
        self._scripts: deque[Sequence[Item] | None] = deque()

    def enqueue(self, script: Sequence[Item] | None) -> None:
        """The script of the next request; None never ends."""
        self._scripts.append(script)

    def submit(self, request: GenerationRequest) -> ScriptedStream:
        if self.state not in (EngineState.READY, EngineState.RECOVERING):
            raise UnavailableError(f"the engine is {self.state.value}")
        script = self._scripts.popleft() if self._scripts else self._default_script(request)
        stream = ScriptedStream(request, script)
        self.requests.append(request)
        self.streams.append(stream)
        return stream

    async def start(self) -> None:
        self.state = EngineState.READY

    async def stop(self) -> None:
        self.state = EngineState.STOPPED

    def _default_script(self, request: GenerationRequest) -> list[Item]:
        items: list[Item] = []
        for index in range(request.num_choices):
            items.extend(answer_deltas(self.tokenizer, self.answer, request, index=index))
        return items


def answer_deltas(tokenizer: Tokenizer, text: str, request: GenerationRequest, *, index: int = 0) -> list[ChoiceDelta]:
    """The deltas with which a text is answered: a token each, cut to the request's max_tokens."""
    sampling = request.sampling
    token_ids = tokenizer.encode(text, add_special_tokens=False)[: sampling.max_tokens]
    whole = len(token_ids) < sampling.max_tokens
    deltas = []
    for token_id in token_ids:
        entry = LogprobEntry(_token(tokenizer, token_id), [_token(tokenizer, token_id)])
        delta = ChoiceDelta(index=index, text=_token(tokenizer, token_id).text, token_ids=[token_id])
        delta.logprobs = None if sampling.num_logprobs is None else [entry]
        deltas.append(delta)
    end = ChoiceDelta(index=index, finish_reason=FinishReason.STOP if whole else FinishReason.LENGTH)
    if whole and sampling.end_token_ids:
        end.token_ids = [sampling.end_token_ids[0]]
    deltas.append(end)
    if sampling.num_prompt_logprobs is not None:
        entries = [LogprobEntry(_token(tokenizer, i), []) for i in request.prompt_token_ids]
        deltas[0].prompt_logprobs = [None, *entries[1:]]
    return deltas


def _token(tokenizer: Tokenizer, token_id: int) -> LogprobToken:
    data = tokenizer.vocabulary.data(token_id)
    return LogprobToken(token_id, data.decode(errors="replace"), data, -0.5 - token_id / 1024)
