"""`reprise serve`: put the parts together, load the model beside the HTTP server, end with a reason."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable

import uvloop

from reprise.api.app import create_app
from reprise.api.server import bind, serve
from reprise.errors import ModelLoadError
from reprise.exit_code import ExitCode
from reprise.generation.async_engine import AsyncEngine
from reprise.generation.engine_entry import run as run_engine
from reprise.generation.engine_process import EngineEntry
from reprise.generation.fork_server import start_fork_server
from reprise.generation.interface import Engine, EngineState
from reprise.generation.supervision import HangLimits
from reprise.hub import comes_from_hub, endpoint, find_on_hub, go_offline_if_unreachable
from reprise.logs import logging_to, take_over
from reprise.notices import in_container, startup_notices
from reprise.replay.store import prepare_directory
from reprise.settings import Settings
from reprise.startup import LoadingDisplay, announce
from reprise.text.tokenizer import Tokenizer
from reprise.text.torch_free import keep_torch_out

logger = logging.getLogger(__name__)

WATCH_INTERVAL = 0.5
"""Seconds between two looks at whether the engine is lost."""
LAST_WORDS = 1.0
"""Seconds for the streams of a lost engine to tell their clients."""


def run(settings: Settings, *, chat_template: str | None = None, engine_entry: EngineEntry = run_engine) -> int:
    """Serve until a signal, or until there is nothing left to serve with. Returns the exit code.

    chat_template: the text of a template that replaces the model's own. engine_entry: what the engine process runs.
    Raises ConfigError where bundles cannot be written or the address cannot be listened on: before anything is
    loaded, and from then on connections wait instead of being refused.
    """
    with logging_to(level=settings.log_level, log_format=settings.log_format):
        for notice in startup_notices(settings, in_container=in_container()):
            logger.log(notice.level, notice.text)
        if settings.bundle_dir is not None:
            prepare_directory(settings.bundle_dir)
        listeners = bind(settings)
        try:
            with LoadingDisplay() as display:
                display.show_stage("tokenizer")
                unreachable = reach_hub(settings.model_path, settings.draft_model_path)
                tokenizer = load_tokenizer(settings.model_path, settings.revision, chat_template, unreachable)
                if settings.draft_model_path is not None:
                    check_draft_model(settings.draft_model_path, tokenizer, unreachable)
                return uvloop.run(_serve(settings, listeners, tokenizer, display, engine_entry))
        except ModelLoadError as error:
            logger.error("cannot serve %s: %s", settings.model, error)
            return ExitCode.MODEL
        except KeyboardInterrupt:
            return ExitCode.OK


def reach_hub(*models: str | None) -> str | None:
    """Why the hub cannot be reached, where one of the models comes from it.

    Before anything is imported that reads whether the hub is to be asked, here or in a child.
    """
    from_hub = [model for model in models if model is not None and _may_come_from_hub(model)]
    for model in from_hub:
        logger.info("there is no directory %r here: asking the hub, %s", model, endpoint(os.environ))
    return go_offline_if_unreachable(os.environ) if from_hub else None


def _may_come_from_hub(model: str) -> bool:
    """No model can be at some paths: that is said where the model is looked for."""
    try:
        return comes_from_hub(model)
    except ModelLoadError:
        return False


def load_tokenizer(model: str, revision: str | None, chat_template: str | None, unreachable: str | None) -> Tokenizer:
    """The tokenizer of a directory or hub id; beside it the fork server begins. Raises ModelLoadError.

    unreachable: what `reach_hub` found.
    """
    start_fork_server()  # its imports take as long as ours, beside them
    keep_torch_out()
    take_over("huggingface_hub", "transformers")
    if comes_from_hub(model):
        find_on_hub(model, revision, unreachable=unreachable)
    return Tokenizer.load(model, revision=revision, chat_template=chat_template)


def check_draft_model(model: str, tokenizer: Tokenizer, unreachable: str | None) -> None:
    """Raises ModelLoadError where a draft model has other tokens than the model: it would guess something else."""
    try:
        if comes_from_hub(model):
            find_on_hub(model, None, unreachable=unreachable)
        of_draft = Tokenizer.load(model).vocabulary
    except ModelLoadError as error:
        raise ModelLoadError(f"--draft-model: {error}") from None
    served = tokenizer.vocabulary
    if of_draft.size != served.size:
        difference = f"it has {of_draft.size} tokens and the model {served.size}"
    else:
        differing = (i for i in range(served.size) if of_draft.data(i) != served.data(i))
        index = next(differing, None)
        if index is None:
            return
        difference = f"token {index} is another one"
    raise ModelLoadError(f"--draft-model: {model!r} cannot guess for this model, whose tokens are others: {difference}")


async def _serve(
    settings: Settings,
    listeners: list[socket.socket],
    tokenizer: Tokenizer,
    display: LoadingDisplay,
    engine_entry: EngineEntry,
) -> int:
    limits = HangLimits(settings.heartbeat_timeout, settings.step_timeout, settings.load_timeout)
    engine = AsyncEngine(
        settings.engine_config(), tokenizer, on_progress=display.show, limits=limits, entry=engine_entry
    )
    app = create_app(settings, tokenizer, engine, [str(listener.getsockname()[0]) for listener in listeners])

    def on_ready() -> None:
        display.close()
        announce(settings, engine, has_chat_template=tokenizer.has_chat_template)

    return await serve_with_engine(
        engine,
        lambda on_started: serve(app, settings, on_started=on_started, listeners=listeners),
        load_timeout=settings.load_timeout,
        on_ready=on_ready,
    )


async def serve_with_engine(
    engine: Engine,
    serve_http: Callable[[Callable[[], None]], Awaitable[int]],
    *,
    load_timeout: float,
    on_ready: Callable[[], None],
) -> int:
    """Run the HTTP server, beside it load the model, then watch the engine.

    Returns the HTTP server's exit code where that ends, ENGINE_LOST where the engine is lost. Raises
    ModelLoadError where loading fails or takes longer than `load_timeout` seconds.
    """
    listening = asyncio.Event()
    serving = asyncio.ensure_future(serve_http(listening.set))
    watching = asyncio.create_task(_load_and_watch(engine, load_timeout, listening, on_ready))
    try:
        await asyncio.wait({serving, watching}, return_when=asyncio.FIRST_COMPLETED)
        return serving.result() if serving.done() else watching.result()
    finally:
        serving.cancel()
        watching.cancel()
        await asyncio.gather(serving, watching, return_exceptions=True)
        await engine.stop()


async def _load_and_watch(
    engine: Engine, load_timeout: float, listening: asyncio.Event, on_ready: Callable[[], None]
) -> int:
    try:
        async with asyncio.timeout(load_timeout):
            await engine.start()
    except TimeoutError:
        raise ModelLoadError(f"loading took longer than load_timeout, {load_timeout:g} seconds") from None
    await listening.wait()
    on_ready()
    while engine.state is not EngineState.FAILED:  # noqa: ASYNC110 # the state is an attribute, no event
        await asyncio.sleep(WATCH_INTERVAL)
    await asyncio.sleep(LAST_WORDS)
    return ExitCode.ENGINE_LOST
