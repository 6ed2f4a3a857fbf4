"""The asyncio client and supervisor of an engine process.

It owns the state that outlives an engine: each live choice's prompt, parameters and tokens so far. When the
process dies, a new one is started and every live choice is added again with what it has, so its stream goes on.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess

import msgspec

from reprise.errors import GenerationError, ModelLoadError, UnavailableError
from reprise.generation.interface import EngineState
from reprise.generation.output_processor import OutputProcessor
from reprise.generation.request_stream import RequestStream
from reprise.ipc.messages import (
    Abort,
    Add,
    EngineConfig,
    EngineStats,
    FromEngine,
    LoadFailed,
    LoadProgress,
    Ready,
    SequenceOutput,
    Start,
    StepOutput,
)
from reprise.ipc.transport import FrameDecoder, MessageCodec, ProtocolError
from reprise.text.tokenizer import Tokenizer
from reprise.types import GenerationRequest

READ_BYTES = 1024 * 1024
MAX_DEATHS = 4
DEATH_WINDOW_SECONDS = 60.0
RESTART_DELAYS = (0.0, 1.0, 2.0, 4.0)
STOP_SECONDS = 5.0

logger = logging.getLogger(__name__)

_context = multiprocessing.get_context("forkserver")


class _Choice:
    """One choice in flight: what an engine needs to go on with it, and what it is made into."""

    def __init__(self, sequence_id: int, index: int, stream: RequestStream, processor: OutputProcessor) -> None:
        self.sequence_id = sequence_id
        self.index = index
        self.stream = stream
        self.processor = processor

    def message(self) -> Add:
        request = self.stream.request
        return Add(
            self.sequence_id,
            self.index,
            request.prompt_token_ids,
            request.sampling,
            self.processor.output_token_ids,
        )


class AsyncEngine:
    """Implements `generation.interface.Engine` over an engine process.

    `on_progress` hears of loading; it is called in the event loop.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        *,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> None:
        self._start_message = Start(config, tokenizer.vocabulary.token_bytes())
        self._tokenizer = tokenizer
        self._on_progress = on_progress
        self._choices: dict[int, _Choice] = {}
        self._ids = itertools.count(1)
        self._codec: MessageCodec[FromEngine] = MessageCodec(FromEngine)
        self._process: ForkServerProcess | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._loaded: asyncio.Future[None] | None = None
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._num_lives_unready = 0
        self.state = EngineState.STOPPED
        self.info: Ready | None = None
        self.stats = EngineStats()
        self.load_progress: LoadProgress | None = None
        self.last_progress = time.monotonic()
        self.num_restarts = 0

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

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Enqueue a request at once. Raises UnavailableError where there is no engine to take it."""
        if self.state not in (EngineState.READY, EngineState.RECOVERING):
            raise UnavailableError(f"the engine is {self.state.value}")
        stream = RequestStream(request, self._abort)
        for index in range(request.num_choices):
            processor = OutputProcessor(index, request, self._tokenizer)
            choice = _Choice(next(self._ids), index, stream, processor)
            self._choices[choice.sequence_id] = choice
            stream.sequence_ids.append(choice.sequence_id)
            if self.state is EngineState.READY:
                self._send(choice.message())
        return stream

    def _abort(self, stream: RequestStream) -> None:
        alive = [i for i in stream.sequence_ids if self._choices.pop(i, None) is not None]
        if alive:
            self._send(Abort(alive))

    def _send(self, message: Add | Abort | Start) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(self._codec.encode(message))

    async def _supervise(self) -> None:
        """Keep an engine process alive until it cannot be loaded or dies too often."""
        try:
            while True:
                self._num_lives_unready += 1
                await self._live()
                if self._num_lives_unready >= MAX_DEATHS:
                    raise ModelLoadError(f"the engine died {self._num_lives_unready} times while loading")
                now = time.monotonic()
                self._deaths.append(now)
                recent = sum(1 for death in self._deaths if now - death < DEATH_WINDOW_SECONDS)
                if recent >= MAX_DEATHS:
                    raise ModelLoadError(f"the engine died {recent} times in {DEATH_WINDOW_SECONDS:.0f} seconds")
                self.state = EngineState.RECOVERING if self.info else EngineState.LOADING
                self.num_restarts += 1
                logger.warning("the engine process died; starting it again", extra={"deaths": recent})
                await asyncio.sleep(RESTART_DELAYS[min(recent - 1, len(RESTART_DELAYS) - 1)])
        except ModelLoadError as error:
            self.state = EngineState.FAILED
            self._fail_all(UnavailableError("the engine is lost and could not be restarted"))
            if self._loaded is not None and not self._loaded.done():
                self._loaded.set_exception(error)
            else:
                logger.error("the engine is lost: %s", error)
        except Exception as error:
            logger.exception("the supervisor of the engine failed")
            self.state = EngineState.FAILED
            self._fail_all(UnavailableError("the engine is lost"))
            if self._loaded is not None and not self._loaded.done():
                self._loaded.set_exception(error)

    async def _live(self) -> None:
        """One life of the engine process: from its start to its end of file. Raises ModelLoadError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        spawning = asyncio.ensure_future(asyncio.to_thread(_spawn, theirs))
        # A thread cannot be cancelled: whatever becomes of this task, the socket is closed when it is done with it.
        spawning.add_done_callback(lambda _: theirs.close())
        try:
            process = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            # The engine, if it still comes to life, sees end of file and ends.
            ours.close()
            raise
        except OSError as error:
            ours.close()
            logger.error("an engine process could not be started: %s", error)
            return
        self._process = process
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        try:
            self._send(self._start_message)
            frames = FrameDecoder()
            while data := await reader.read(READ_BYTES):
                for frame in frames.feed(data):
                    self._receive(self._codec.decode(frame))
        except (ProtocolError, ConnectionResetError) as error:
            logger.error("the channel to the engine broke: %s", error)
        finally:
            self._writer.close()
            self._writer = None
            process.kill()
            await asyncio.shield(asyncio.to_thread(process.join, STOP_SECONDS))
        logger.warning("the engine process ended", extra={"exit_code": process.exitcode})

    def _receive(self, message: FromEngine) -> None:
        self.last_progress = time.monotonic()
        match message:
            case StepOutput(outputs, stats):
                self.stats = stats
                for output in outputs:
                    self._deliver(output)
            case LoadProgress():
                self.load_progress = message
                if self._on_progress is not None:
                    self._on_progress(message)
            case Ready():
                self._check_same(message)
                self.info = message
                self.state = EngineState.READY
                self._num_lives_unready = 0
                config = msgspec.structs.replace(self._start_message.config, kv_cache_memory=message.kv_cache_memory)
                self._start_message = msgspec.structs.replace(self._start_message, config=config)
                for choice in self._choices.values():
                    self._send(choice.message())
                if self._loaded is not None and not self._loaded.done():
                    self._loaded.set_result(None)
            case LoadFailed(text):
                raise ModelLoadError(text)

    def _check_same(self, ready: Ready) -> None:
        """A stream must not go on with other weights. Raises ModelLoadError."""
        if self.info is not None and self.info.weights_fingerprint != ready.weights_fingerprint:
            raise ModelLoadError("the weights on disk are no longer those that were served")

    def _deliver(self, output: SequenceOutput) -> None:
        choice = self._choices.get(output.sequence_id)
        if choice is None:
            return
        try:
            delta = choice.processor.push(output)
        except GenerationError as error:
            self._end(choice, error)
            return
        except Exception:
            logger.exception("a choice's tokens could not be made into text")
            self._end(choice, GenerationError("the tokens could not be made into text", code="internal_error"))
            return
        if delta is not None:
            choice.stream.put(delta)
        if choice.processor.finished:
            del self._choices[choice.sequence_id]
            if output.finish_reason is None:
                self._send(Abort([choice.sequence_id]))

    def _end(self, choice: _Choice, error: Exception) -> None:
        """One choice failed: its request cannot be completed, so its siblings are not needed either."""
        self._abort(choice.stream)
        choice.stream.fail(error)

    def _fail_all(self, error: Exception) -> None:
        choices, self._choices = self._choices, {}
        for choice in choices.values():
            choice.stream.fail(error)


def start_fork_server() -> None:
    """Start the fork server unless it runs. Returns at once: it imports in its own time."""
    # Read when OpenMP loads, in the fork server: threads that wait by spinning starve the event loop, and each
    # other, on a machine whose cores are all in use.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _context.set_forkserver_preload(["reprise.engine.preload"])
    forkserver.ensure_running()


def _spawn(sock: socket.socket) -> ForkServerProcess:
    """A child of the fork server with one end of the socket pair. Blocks while the fork server imports."""
    from reprise.generation.engine_entry import run

    start_fork_server()
    process = _context.Process(target=run, args=(sock, os.getpid()), name="reprise-engine", daemon=True)
    process.start()
    return process
