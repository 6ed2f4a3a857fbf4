"""What the operator sees of a start: the loading progress, and then what is served and how to try it."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from types import TracebackType
from typing import Self

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from reprise import __version__
from reprise.generation.interface import Engine
from reprise.ipc.messages import LoadProgress, Ready
from reprise.settings import Settings

logger = logging.getLogger(__name__)


class LoadingDisplay:
    """Loading progress: a bar on a terminal, elsewhere a log line for each stage."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(file=sys.stderr)
        self._stage = ""
        self._bar: Progress | None = None
        if console.is_terminal and logger.isEnabledFor(logging.INFO):
            columns = (
                TextColumn("loading"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def show(self, progress: LoadProgress) -> None:
        if self._bar is not None:
            self._bar.update(
                self._task, description=progress.stage.removeprefix("loading "), completed=progress.fraction
            )
        elif progress.stage != self._stage:
            logger.info("loading: %s", progress.stage.removeprefix("loading "))
        self._stage = progress.stage

    def show_stage(self, stage: str) -> None:
        """A stage at its beginning."""
        self.show(LoadProgress(stage=stage, fraction=0.0))

    def close(self) -> None:
        """Take the bar away. Idempotent."""
        if self._bar is not None:
            self._bar.stop()


def announce(settings: Settings, engine: Engine, *, has_chat_template: bool) -> None:
    """Log what is served: lines for people, an object for machines."""
    info = engine.info
    if info is None:
        raise RuntimeError("an engine that has started tells what it loaded")
    text = summary(settings, info, has_chat_template=has_chat_template)
    extra = {
        "plain": text,
        "url": base_url(settings),
        "try": try_command(settings, has_chat_template=has_chat_template),
        "engine": msgspec.structs.asdict(info),
    }
    logger.info("serving %s", ", ".join(settings.model_names), extra=extra)


def summary(settings: Settings, info: Ready, *, has_chat_template: bool) -> str:
    """What is served, where, on what, with how much memory, and a command to try it."""
    device = info.device if info.device_name in ("", info.device) else f"{info.device} ({info.device_name})"
    lines = {
        "model": f"{info.architecture}, {_count(info.num_parameters)} parameters, {info.dtype} on {device}",
        "tier": f"{info.tier}: {info.tier_reason}",
        "kernels": info.kernels,
        "repeats": f"{'yes' if info.deterministic else 'no'}: {info.deterministic_reason}",
        "memory": f"{info.num_kv_tokens:,} KV tokens, {info.max_num_seqs} sequences at once",
        "context": f"{info.max_sequence_tokens:,} tokens of prompt and output",
        "loaded": f"in {info.load_seconds:.1f} s",
        "try": try_command(settings, has_chat_template=has_chat_template),
    }
    head = f"reprise {__version__} serves {', '.join(settings.model_names)} at {base_url(settings)}"
    return "\n".join([head, *(f"  {name:8} {text}" for name, text in lines.items())])


def base_url(settings: Settings) -> str:
    """The address that a client on this machine uses."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)  # noqa: S104 # compared with, not bound to
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"http://{host}:{settings.port}"


def try_command(settings: Settings, *, has_chat_template: bool) -> str:
    """A curl command that streams a first answer; the key stays a variable."""
    body: dict[str, object] = {"model": settings.model_names[0], "stream": True}
    if has_chat_template:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "Hello!"}]
    else:
        path, body["prompt"] = "/v1/completions", "Hello"
    key = ' -H "Authorization: Bearer $REPRISE_API_KEY"' if settings.api_key else ""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl -N {base_url(settings)}{path} -H 'Content-Type: application/json'{key} -d {data}"


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
