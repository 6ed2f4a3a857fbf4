"""The asyncio client and supervisor of an engine process.

It owns the state that outlives an engine: each live choice's prompt, parameters and tokens so far. When the
process dies or hangs, a new one is started and every live choice is added again with what it has, so its stream
goes on. What to make of a death is decided in `supervision`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable

import msgspec

from reprise.errors import GenerationError, ModelLoadError, UnavailableError
from reprise.generation.engine_entry import run as run_engine
from reprise.generation.engine_process import EngineEntry, EngineProcess
from reprise.generation.engine_stats import after_death, in_all
from reprise.generation.interface import EngineState
from reprise.generation.output_processor import OutputProcessor
from reprise.generation.request_stream import RequestStream
from reprise.generation.supervision import HangLimits, RestartPolicy, Suspects, Watchdog, is_duplicate
from reprise.ipc.messages import (
    Abort,
    Add,
    EngineConfig,
    EngineStats,
    FromEngine,
    Heartbeat,
    LoadFailed,
    LoadProgress,
    Ready,
    SequenceOutput,
    Start,
    StepOutput,
)
from reprise.ipc.transport import ProtocolError
from reprise.text.tokenizer import Tokenizer
from reprise.types import FinishReason, GenerationRequest

DELIVERED_AT_ONCE = 16
"""Choices whose readers are woken in one turn of the event loop: they take a few milliseconds."""

logger = logging.getLogger(__name__)


class _Choice:
    """One choice in flight: what an engine needs to go on with it, and what it is made into."""

    def __init__(self, choice_id: int, index: int, stream: RequestStream, processor: OutputProcessor) -> None:
        self.choice_id = choice_id
        self.index = index
        self.stream = stream
        self.processor = processor
        self.sequence_id: int | None = None
        """What the engine calls it: another name each time it is added. None while it is in no engine."""
        self.interrupted_at: float | None = None
        """When the engine that it was in died; None once it has gone on."""

    def message(self, sequence_id: int) -> Add:
        request = self.stream.request
        return Add(
            sequence_id,
            self.index,
            request.prompt_token_ids,
            request.sampling,
            self.processor.output_token_ids,
            request.prediction_token_ids,
        )


class AsyncEngine:
    """Implements `generation.interface.Engine` over an engine process.

    `on_progress` hears of loading; it is called in the event loop. `entry` is what the process runs.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        *,
        on_progress: Callable[[LoadProgress], None] | None = None,
        limits: HangLimits | None = None,
        entry: EngineEntry = run_engine,
    ) -> None:
        # A size that was given is taken early; a default takes nothing from others before it is needed.
        reserve = config.kv_cache_memory is not None
        self._start_message = Start(config, tokenizer.vocabulary.token_bytes(), reserve)
        self._tokenizer = tokenizer
        self._on_progress = on_progress
        self._limits = limits or HangLimits()
        self._entry = entry
        self._choices: dict[int, _Choice] = {}
        self._by_sequence_id: dict[int, _Choice] = {}
        self._leaving: dict[int, int] = {}
        """Choices by the names that the engine knew them by, until its last word on those."""
        self._ids = itertools.count(1)
        self._suspects = Suspects()
        self._restarts = RestartPolicy()
        self._process: EngineProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._loaded: asyncio.Future[None] | None = None
        self.state = EngineState.STOPPED
        self.info: Ready | None = None
        self._past_stats = self._stats = EngineStats()
        self.load_progress: LoadProgress | None = None
        self.last_progress = self.last_heartbeat = time.monotonic()
        self.num_restarts = 0
        self.num_hung = 0
        self.num_recovered = 0
        self.num_lost = 0
        self.num_convicted = 0
        self.num_dropped = 0
        self.num_failed: Counter[str] = Counter()
        self.last_recovery_seconds = 0.0

    async def start(self) -> None:
        """Start the process and wait until the model is loaded. Raises ModelLoadError."""
        self.state = EngineState.LOADING
        self._loaded = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise())
        await asyncio.shield(self._loaded)

    async def stop(self) -> None:
        """End the process; what is in flight raises UnavailableError in its streams."""
        self.state = EngineState.STOPPED
        if self._loaded is not None and not self._loaded.done():
            self._loaded.cancel()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._fail_all(UnavailableError("the server is shutting down"))

    @property
    def pid(self) -> int | None:
        """Of the engine process, for whoever wants to look at it or kill it."""
        return self._process.pid if self._process is not None else None

    @property
    def stats(self) -> EngineStats:
        """Of all lives. A choice that does not run waits, for a place, for a trial's end or for an engine."""
        num_waiting = max(0, len(self._choices) - self._stats.num_running)
        return msgspec.structs.replace(self._stats, num_waiting=num_waiting)

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Enqueue a request at once. Raises UnavailableError where there is no engine to take it."""
        if self.state not in (EngineState.READY, EngineState.RECOVERING):
            raise UnavailableError(f"the engine is {self.state.value}")
        stream = RequestStream(request, self._abort)
        for index in range(request.num_choices):
            processor = OutputProcessor(index, request, self._tokenizer)
            choice = _Choice(next(self._ids), index, stream, processor)
            self._choices[choice.choice_id] = choice
            stream.sequence_ids.append(choice.choice_id)
        self._suspects.add(stream.sequence_ids)
        self._move()
        return stream

    def _abort(self, stream: RequestStream) -> None:
        self._forget([choice for i in stream.sequence_ids if (choice := self._choices.get(i)) is not None])

    def _forget(self, choices: list[_Choice], *, in_engine: bool = True) -> None:
        """These choices have ended. in_engine: whether the engine may still be at them."""
        was_on_trial = self._suspects.on_trial
        for choice in choices:
            del self._choices[choice.choice_id]
            self._suspects.remove(choice.choice_id)
        self._take_out(choices, tell=in_engine)
        if was_on_trial:
            self._move()

    def _take_out(self, choices: list[_Choice], *, tell: bool = True) -> None:
        """What the engine still says of these is not heard. tell: have it stop."""
        sequence_ids: list[int] = []
        for choice in choices:
            if choice.sequence_id is not None:
                sequence_ids.append(choice.sequence_id)
                del self._by_sequence_id[choice.sequence_id]
                self._leaving[choice.sequence_id] = choice.choice_id
                choice.sequence_id = None
        if tell and sequence_ids and self._process is not None:
            self._process.send(Abort(sequence_ids))

    def _move(self) -> None:
        """Have in the engine whom it should hold now."""
        if self._process is None:
            return
        moves = self._suspects.moves()
        self._take_out([self._choices[choice_id] for choice_id in moves.withdraw])
        for choice_id in moves.add:
            choice = self._choices[choice_id]
            choice.sequence_id = next(self._ids)
            self._by_sequence_id[choice.sequence_id] = choice
            self._process.send(choice.message(choice.sequence_id))

    async def _supervise(self) -> None:
        """Keep an engine process alive until it cannot be loaded or gets nothing done."""
        try:
            while True:
                self._restarts.began()
                killed = await self._live()
                await asyncio.sleep(self._bury(killed=killed))
        except Exception as error:
            if not isinstance(error, ModelLoadError):
                logger.exception("the supervisor of the engine failed")
            self.state = EngineState.FAILED
            self.num_lost += len(self._choices)
            self._fail_all(UnavailableError("the engine is lost and could not be restarted"))
            if self._loaded is not None and not self._loaded.done():
                self._loaded.set_exception(error)
            else:
                logger.error("the engine is lost: %s", error)

    async def _live(self) -> bool:
        """One life of the engine process. Returns whether somebody else killed it. Raises ModelLoadError."""
        try:
            process = await EngineProcess.start(self._entry, self._limits.start_timeout)
        except (OSError, EOFError) as error:
            logger.error("an engine process could not be started: %s", error)
            return False
        self._process = process
        said_why = False
        watchdog = Watchdog(self._limits, time.monotonic())
        watching = asyncio.create_task(self._watch(process, watchdog))
        try:
            process.send(self._start_message)
            while messages := await process.read():
                self.last_heartbeat = time.monotonic()
                watchdog.heard()
                for message in messages:
                    if not isinstance(message, StepOutput) and not self._receive(message):
                        said_why = True
                        return False
                if steps := [message for message in messages if isinstance(message, StepOutput)]:
                    watchdog.progressed()
                    await self._take_in(steps)
        except ModelLoadError:
            said_why = True
            raise
        except ProtocolError as error:
            logger.error("the channel to the engine broke: %s", error)
        finally:
            self._process = None
            self._past_stats = self._stats = after_death(self._stats)
            if self.state is EngineState.READY:
                self.state = EngineState.RECOVERING
            watching.cancel()
            how = await asyncio.shield(process.end())
            expected = said_why or self.state is EngineState.STOPPED
            logger.log(logging.DEBUG if expected else logging.WARNING, "the engine process ended %s", how)
        return process.was_killed

    async def _watch(self, process: EngineProcess, watchdog: Watchdog) -> None:
        """End the process where it hangs: what follows is as after any other death."""
        reason = None
        while reason is None:
            await asyncio.sleep(watchdog.interval)
            loading = self.state is not EngineState.READY
            reason = watchdog.look(time.monotonic(), loading=loading)
        self.num_hung += 1
        logger.error("the engine process hangs and is killed: %s", reason, extra={"pid": process.pid})
        await process.kill_hung()

    def _bury(self, *, killed: bool) -> float:
        """Draw the conclusions from a death. Returns the seconds to wait. Raises ModelLoadError to give up."""
        now = time.monotonic()
        self.num_restarts += 1
        interrupted = list(self._by_sequence_id.values())
        self._take_out(interrupted)
        self._leaving.clear()
        for choice in interrupted:
            if choice.interrupted_at is None:
                choice.interrupted_at = now
        conviction = self._suspects.died(killed=killed)
        restart = self._restarts.died(now, explained=conviction.deaths if conviction is not None else ())
        if conviction is not None:
            self._convict([self._choices[choice_id] for choice_id in conviction.choice_ids], conviction.num_deaths)
        if restart.given_up is not None:
            raise ModelLoadError(restart.given_up)
        logger.warning("starting the engine process again for %d choices in flight", len(self._choices))
        return restart.delay

    def _convict(self, choices: list[_Choice], num_deaths: int) -> None:
        stream = choices[0].stream
        self.num_convicted += 1
        self.num_lost += len(choices)
        logger.error(
            "request %s ended the engine process %d times and is given up", stream.request.request_id, num_deaths
        )
        message = f"this request ended the engine process {num_deaths} times and was given up"
        self._end(choices[0], GenerationError(message, code="internal_error"))

    async def _take_in(self, steps: list[StepOutput]) -> None:
        """Deliver, and let readers write in between: together, those of a large step would stop the loop for long.

        What several steps gave for one choice is delivered at once, so that a reader that is late gets it as one.
        """
        self.last_progress = time.monotonic()
        self._stats = in_all(self._past_stats, steps[-1].stats)
        outputs: dict[int, list[SequenceOutput]] = {}
        for step in steps:
            for output in step.outputs:
                outputs.setdefault(output.sequence_id, []).append(output)
        for number, of_one in enumerate(outputs.values(), start=1):
            for output in of_one:
                self._deliver(output)
                if output.finish_reason is not None and output.sequence_id in self._leaving:
                    self._suspects.left(self._leaving.pop(output.sequence_id))
            if number % DELIVERED_AT_ONCE == 0:
                await asyncio.sleep(0)

    def _receive(self, message: FromEngine) -> bool:
        """Whether to go on listening. Raises ModelLoadError."""
        match message:
            case Heartbeat():
                pass
            case LoadProgress():
                self.load_progress = message
                if self._on_progress is not None:
                    self._on_progress(message)
            case Ready():
                self._become_ready(message)
            case LoadFailed(text):
                if self.info is None:
                    raise ModelLoadError(text)
                # What could be loaded once may be loadable again: memory may be short for a moment.
                logger.error("the engine could not be loaded again: %s", text)
                return False
        return True

    def _become_ready(self, ready: Ready) -> None:
        self._check_same(ready)
        self.info = ready
        self.state = EngineState.READY
        self.last_progress = time.monotonic()
        self._restarts.ready(self.last_progress)
        self._suspects.ready()
        config = msgspec.structs.replace(self._start_message.config, kv_cache_memory=ready.kv_cache_memory)
        self._start_message = msgspec.structs.replace(self._start_message, config=config)
        self._move()
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_result(None)

    def _check_same(self, ready: Ready) -> None:
        """A stream must not go on with another model, or other bits where they were promised. Raises ModelLoadError."""
        if self.info is None:
            return
        if self.info.weights_fingerprint != ready.weights_fingerprint:
            raise ModelLoadError("the weights on disk are no longer those that were served")
        if self.info.model_config_fingerprint != ready.model_config_fingerprint:
            raise ModelLoadError("the model's configuration on disk is no longer the one that was served")
        if self.info.deterministic != ready.deterministic:
            raise ModelLoadError(f"deterministic was {self.info.deterministic} and is {ready.deterministic} now")
        if ready.deterministic and self.info.numerics_fingerprint != ready.numerics_fingerprint:
            raise ModelLoadError("the engine computes other bits than before it died")

    def _deliver(self, output: SequenceOutput) -> None:
        choice = self._by_sequence_id.get(output.sequence_id)
        if choice is None or is_duplicate(output, choice.processor.output_token_ids):
            # An aborted sequence's last words are as expected.
            self.num_dropped += output.finish_reason is not FinishReason.ABORT
            return
        try:
            delta = choice.processor.push(output)
        except GenerationError as error:
            self._fail(choice, error)
            return
        except Exception:
            logger.exception("a choice's tokens could not be made into text")
            self._fail(choice, GenerationError("the tokens could not be made into text", code="internal_error"))
            return
        if output.token_ids or choice.processor.finished:
            self._note_progress(choice, len(output.token_ids))
        if choice.processor.finished:
            self._forget([choice], in_engine=output.finish_reason is None)
        if delta is not None:
            choice.stream.put(delta)

    def _note_progress(self, choice: _Choice, num_tokens: int) -> None:
        self._restarts.delivered()
        if choice.interrupted_at is not None:
            self.num_recovered += 1
            self.last_recovery_seconds = time.monotonic() - choice.interrupted_at
            choice.interrupted_at = None
        if self._suspects.delivered(choice.choice_id, num_tokens):
            self._move()

    def _fail(self, choice: _Choice, error: GenerationError) -> None:
        self.num_failed[error.code] += 1
        self._end(choice, error)

    def _end(self, choice: _Choice, error: Exception) -> None:
        """One choice failed: its request cannot be completed, so its siblings are not needed either."""
        self._abort(choice.stream)
        choice.stream.fail(error)

    def _fail_all(self, error: Exception) -> None:
        choices = list(self._choices.values())
        self._forget(choices)
        for choice in choices:
            choice.stream.fail(error)
