"""The engine process: one loop between a connection and the engine core."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import time
import traceback

import torch
import transformers

from reprise.engine.block_pool import BlockPool
from reprise.engine.core import EngineCore
from reprise.engine.draft_model import DraftModel
from reprise.engine.drafter import Drafter, Guesser
from reprise.engine.loader import LoadedModel, load
from reprise.engine.prediction import Prediction
from reprise.engine.prompt_lookup import PromptLookup
from reprise.engine.pulse import Pulse
from reprise.engine.reservation import Reservation
from reprise.engine.sampler import Sampler
from reprise.engine.scheduler import Scheduler
from reprise.errors import ModelLoadError
from reprise.ipc.messages import (
    IDLE_SECONDS,
    Abort,
    Add,
    LoadFailed,
    LoadProgress,
    SequenceOutput,
    Start,
    StepOutput,
    ToEngine,
)
from reprise.ipc.transport import BlockingConnection, ConnectionClosed, ProtocolError

RESERVING_SECONDS = 0.005
"""How long an engine that takes memory does not look for requests, beside the piece that it has begun."""
EXIT_FAILED = 1

logger = logging.getLogger(__name__)


def run_engine(sock: socket.socket) -> None:
    """Serve the peer of `sock` until it closes. The first message says what to load.

    Where the loop itself fails, as on a lost GPU, the process ends with EXIT_FAILED: only another one can go on.
    """
    # A terminal sends Ctrl-C to the whole group, and systemd SIGTERM to the whole service; the API process decides when
    # this one ends, after its streams.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Where a crash happened, and, when the supervisor asks, where it hangs: functions and lines, no data.
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # What transformers would print is either an error that we raise by name, or advice that nobody can follow here.
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    connection: BlockingConnection[ToEngine] = BlockingConnection(sock, ToEngine)
    Pulse(connection).start()
    try:
        first: list[ToEngine] = []
        while not first:
            first = connection.receive(IDLE_SECONDS)
        loaded = _load(first[0], connection)
        if loaded is not None:
            _loop(*loaded, connection, first[1:])
    except ConnectionClosed:
        logger.debug("the API process is gone")
    except Exception as error:  # noqa: BLE001 # whatever it is, the process must end, and at once: no clean-up on a lost device
        frames = "".join(traceback.format_tb(error.__traceback__))
        logger.critical("the engine failed with %s at\n%s", type(error).__name__, frames)
        os._exit(EXIT_FAILED)
    finally:
        connection.close()


def build_core(loaded: LoadedModel, token_bytes: list[bytes] | None) -> EngineCore:
    """The engine core over a loaded model."""
    pool = BlockPool(loaded.num_blocks, loaded.block_size)
    scheduler = Scheduler(loaded.limits, pool, build_drafter(loaded))
    return EngineCore(scheduler, loaded.runner, Sampler(token_bytes, loaded.selection))


def build_drafter(loaded: LoadedModel) -> Drafter:
    """Guesses from the prediction of a request first, then as the settings say."""
    guessers: list[Guesser] = [Prediction()]
    if loaded.looks_up:
        guessers.append(PromptLookup())
    draft = loaded.draft
    if draft is not None:
        guessers.append(
            DraftModel(
                draft.runner,
                BlockPool(draft.num_blocks, draft.block_size),
                Sampler(None, loaded.selection),
                num_token_ids=draft.num_token_ids,
                max_tokens=draft.ready.max_sequence_tokens,
                catch_up_tokens=draft.limits.max_num_batched_tokens,
                cost=draft.ready.num_parameters / loaded.ready.num_parameters,
            )
        )
    return Drafter(guessers, loaded.num_token_ids)


def _load(message: ToEngine, connection: BlockingConnection[ToEngine]) -> tuple[EngineCore, Reservation] | None:
    if not isinstance(message, Start):
        raise ProtocolError("the first message must be Start")

    def progress(stage: str, fraction: float) -> None:
        connection.send(LoadProgress(stage, fraction))

    try:
        loaded = load(message.config, progress)
    except ModelLoadError as error:
        connection.send(LoadFailed(str(error)))
        return None
    except (MemoryError, torch.OutOfMemoryError):
        connection.send(LoadFailed(f"'{message.config.model}' does not fit into memory"))
        return None
    except Exception as error:
        logger.exception("loading failed")
        cause = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        connection.send(LoadFailed(f"'{message.config.model}' cannot be loaded: {cause}"))
        return None
    core = build_core(loaded, message.token_bytes)
    connection.send(loaded.ready)
    return core, Reservation(loaded.key_value_memory if message.reserve_kv_cache else ())


def _loop(
    core: EngineCore, reservation: Reservation, connection: BlockingConnection[ToEngine], pending: list[ToEngine]
) -> None:
    step_seconds = 0.0
    was_busy = unchecked = False
    said_so_at = time.monotonic()
    while True:
        is_idle = not (core.has_work or was_busy or pending)
        messages = [*pending, *connection.receive(IDLE_SECONDS if is_idle and reservation.is_complete else 0)]
        at_rest = is_idle and not messages
        if at_rest and not reservation.is_complete:
            reservation.advance(RESERVING_SECONDS)
            if time.monotonic() - said_so_at < IDLE_SECONDS:
                continue
        pending = []
        outputs = _take_in(core, messages)
        has_work = core.has_work
        if at_rest and unchecked:
            # Not as soon as there is nothing to do: who asks again at once would wait for it.
            core.check()
        unchecked = has_work or (unchecked and not at_rest)
        was_busy = has_work
        if has_work:
            if outputs:
                # The step may be this process's last, and who is out of it already has no part in that.
                connection.send(StepOutput(outputs, core.stats(step_seconds)))
            started = time.monotonic()
            outputs = core.step()
            step_seconds += time.monotonic() - started
        connection.send(StepOutput(outputs, core.stats(step_seconds)))
        said_so_at = time.monotonic()


def _take_in(core: EngineCore, messages: list[ToEngine]) -> list[SequenceOutput]:
    outputs: list[SequenceOutput] = []
    for message in messages:
        match message:
            case Add():
                outputs += core.add(message)
            case Abort(sequence_ids):
                outputs += core.abort(sequence_ids)
            case Start():
                raise ProtocolError("Start came twice")
    return outputs


def run_forked(sock: socket.socket, parent: int) -> None:
    """Entry point of a child of the fork server. `parent` is the API process, which may be gone already."""
    try:
        os.kill(parent, 0)
    except ProcessLookupError:
        return
    run_engine(sock)
