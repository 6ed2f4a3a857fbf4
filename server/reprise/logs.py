"""Logging of the API process: stdlib loggers, one writer thread behind a bounded queue.

Whoever logs never waits: where nobody reads the output, the queue fills and further records are dropped.
Records say ids, counts and times; never prompts, outputs or keys.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import QueueHandler
from typing import Literal

QUEUE_SIZE = 4096
_STDERR = 2
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    "plain",
}


class TextFormatter(logging.Formatter):
    """`12:00:00 WARNING text`; a record with `extra={"plain": text}` is that text alone."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
        self._start = "\r\x1b[2K" if terminal else ""  # a progress bar may stand on the line

    def format(self, record: logging.LogRecord) -> str:
        plain = getattr(record, "plain", None)
        return self._start + (super().format(record) if plain is None else plain)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the members of `extra`, the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class BoundedQueueHandler(QueueHandler):
    """Formats in the calling thread and enqueues; drops and counts where the queue is full."""

    queue: queue.Queue[str | None]

    def __init__(self, formatter: logging.Formatter, size: int = QUEUE_SIZE) -> None:
        super().__init__(queue.Queue(size))
        self.setFormatter(formatter)
        self.num_dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(self.format(record))
        except queue.Full:
            self.num_dropped += 1
        except Exception:  # noqa: BLE001 # as every handler of logging: a bad record is reported, never raised
            self.handleError(record)


class Writer:
    """The thread that writes queued lines to a file descriptor.

    It uses the descriptor itself: a thread stuck in a stream's buffer would keep the interpreter from ending.
    """

    def __init__(self, handler: BoundedQueueHandler, descriptor: int) -> None:
        self._handler = handler
        self._descriptor = descriptor
        self._num_reported = 0
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 1.0) -> None:
        """Write what is queued, as far as `timeout` seconds allow."""
        try:
            self._handler.queue.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _run(self) -> None:
        while (line := self._handler.queue.get()) is not None:
            self._write(line)
            num_new = self._handler.num_dropped - self._num_reported
            if num_new and self._handler.queue.empty():
                self._num_reported += num_new
                self._write(self._dropped(num_new))

    def _dropped(self, num_dropped: int) -> str:
        message = f"{num_dropped} log records were dropped: the output was not read fast enough"
        attributes = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": message}
        return self._handler.format(logging.makeLogRecord(attributes))

    def _write(self, line: str) -> None:
        data = (line + "\n").encode("utf-8", "backslashreplace")
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            self._handler.num_dropped += 1


def take_over(*libraries: str) -> None:
    """Let libraries that print their records themselves, as they do once imported, leave them to the root."""
    for name in libraries:
        importlib.import_module(f"{name}.utils.logging")
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True


@contextmanager
def logging_to(
    descriptor: int = _STDERR,
    *,
    level: str = "info",
    log_format: Literal["auto", "text", "json"] = "auto",
    size: int = QUEUE_SIZE,
) -> Iterator[BoundedQueueHandler]:
    """Route all logging to a file descriptor: that of `reprise` from `level` on, others from warning on."""
    terminal = os.isatty(descriptor)
    text = log_format == "text" or (log_format == "auto" and terminal)
    handler = BoundedQueueHandler(TextFormatter(terminal=terminal) if text else JsonFormatter(), size)
    root, ours = logging.getLogger(), logging.getLogger("reprise")
    before = (root.handlers[:], root.level, ours.level)
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    ours.setLevel(level.upper())
    logging.captureWarnings(True)  # noqa: FBT003 # the standard library's signature
    writer = Writer(handler, descriptor)
    try:
        yield handler
    finally:
        writer.close()
        logging.captureWarnings(False)  # noqa: FBT003 # as above
        root.handlers[:], root.level, ours.level = before
