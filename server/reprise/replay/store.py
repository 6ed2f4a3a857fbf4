"""The directory that a server writes bundles to: one file a response, the oldest removed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

from reprise.errors import BundleError, ConfigError
from reprise.replay.bundle import MAX_BUNDLE_BYTES, Bundle, encode, read_bundle

MAX_PENDING = 64
"""Bundles that wait to be written; beyond it they are dropped, for the disk is too slow."""
MAX_TRIES = 3
"""Of writing one bundle, where the disk is full and the oldest ones make room: others may fill it just as fast."""
CLOSE_SECONDS = 5.0
"""For the bundles that wait to be written when the server ends."""
STALE_SECONDS = 3600
"""Age at which a file that was never completed is removed."""
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_ID = re.compile(r"(?:chatcmpl|cmpl)-[A-Za-z0-9_-]{1,100}")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def prepare_directory(directory: Path) -> None:
    """Make the directory, for its owner alone, unless it is there.

    Raises ConfigError where no file can be made in it.
    """
    trial = directory / f".trial-{os.getpid()}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        trial.touch(mode=0o600)
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"bundle_dir: {str(directory)!r} cannot be written to: {error.strerror}") from None


class BundleStore:
    """Writes bundles in a thread of its own. Nothing that befalls a file disturbs who hands one over."""

    def __init__(self, directory: Path, *, max_bundles: int) -> None:
        """max_bundles: files to keep. Raises ConfigError."""
        prepare_directory(directory)
        self._directory = directory
        self._max_bundles = max_bundles
        self._names = dict.fromkeys(_bundles_in(directory))
        """Those that are there, the oldest first."""
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """None: the last one."""
        self._lock = threading.Lock()
        self._num_pending = 0
        self._closed = False
        self._failing = False
        self._making_room = False
        self._room_is_lost = False
        """Whether the last that was removed made no room, as where others fill the disk: then the rest stays."""
        self.num_written = 0
        self.num_failed = 0
        """Responses that have no bundle, for whatever reason."""
        # The interpreter waits for no daemon: a disk that hangs keeps no process from ending.
        self._thread = threading.Thread(target=self._run, name="reprise-bundles", daemon=True)
        self._thread.start()

    def put(self, make: Callable[[], Bundle]) -> None:
        """Have a bundle made and written, both in the thread. Never raises and never waits."""
        with self._lock:
            if self._closed:
                return
            full = self._num_pending >= MAX_PENDING
            if not full:
                self._num_pending += 1
                self._jobs.put(partial(self._write, make))
        if full:
            self._failed(f"{MAX_PENDING} of them wait to be written")

    async def get(self, response_id: str) -> Bundle | None:
        """The bundle of a response, after all that were put before; None where there is none. Raises BundleError."""
        if _ID.fullmatch(response_id) is None:
            return None
        found: Future[Bundle | None] = Future()
        with self._lock:
            if self._closed:
                raise BundleError(f"{self._path(response_id)} cannot be read: the store is closed")
            self._jobs.put(partial(_fulfil, found, partial(self._read, response_id)))
        return await asyncio.wrap_future(found)

    def close(self) -> None:
        """Write what was put. Waits for it, CLOSE_SECONDS at most, and logs what was not written. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join(CLOSE_SECONDS)
        with self._lock:
            num_left = self._num_pending
        if num_left:
            bundles = "1 bundle was" if num_left == 1 else f"{num_left} bundles were"
            logger.warning("%s not written: the disk is too slow", bundles)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _read(self, response_id: str) -> Bundle | None:
        path = self._path(response_id)
        return read_bundle(path) if path.exists() else None

    def _path(self, response_id: str) -> Path:
        return self._directory / f"{response_id}.json"

    def _write(self, make: Callable[[], Bundle]) -> None:
        try:
            bundle = make()
            if _ID.fullmatch(bundle.id) is None:
                raise BundleError("the response's id is no file name")
            data = encode(bundle)
            if len(data) > MAX_BUNDLE_BYTES:
                raise BundleError(f"it has {len(data)} bytes, more than {MAX_BUNDLE_BYTES}")
            self._keep(self._path(bundle.id), data)
        except OSError as error:
            self._failed(f"{self._directory}: {error.strerror}")
        except BundleError as error:
            self._failed(str(error))
        except Exception as error:  # noqa: BLE001 - a message may quote a prompt, and nobody waits for this
            self._failed(type(error).__name__)
        else:
            self._failing = False
            self.num_written += 1
        finally:
            with self._lock:
                self._num_pending -= 1

    def _keep(self, path: Path, data: bytes) -> None:
        """Write a file and remove the oldest ones: those beyond the limit, and where there is no room, further ones."""
        for number in range(1, MAX_TRIES + 1):
            try:
                self._replace(path, data)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                self._room_is_lost |= number == MAX_TRIES
                if self._room_is_lost or not self._make_room(len(data), error):
                    raise
            else:
                self._room_is_lost = False
                break
        self._names.pop(path.name, None)
        self._names[path.name] = None
        while len(self._names) > self._max_bundles:
            self._making_room = False  # there is room for all
            self._remove_oldest()

    def _make_room(self, num_bytes: int, error: OSError) -> bool:
        """Remove the oldest files, as many as have so many bytes together.

        Returns whether there are so many; else all stay. Logs it once, until there is room for all that are to be kept.
        """
        if sum(self._num_bytes(name) for name in self._names) < num_bytes:
            return False
        if not self._making_room:
            self._making_room = True
            reason = os.strerror(error.errno or 0)
            logger.warning("%s: %s; the oldest bundles are removed to make room", self._directory, reason)
        while self._names and num_bytes > 0:
            num_bytes -= self._remove_oldest()
        return True

    def _num_bytes(self, name: str) -> int:
        with contextlib.suppress(FileNotFoundError):
            return (self._directory / name).lstat().st_size
        return 0

    def _remove_oldest(self) -> int:
        """Returns its size in bytes."""
        oldest = next(iter(self._names))
        num_bytes = self._num_bytes(oldest)
        (self._directory / oldest).unlink(missing_ok=True)
        del self._names[oldest]
        return num_bytes

    def _replace(self, path: Path, data: bytes) -> None:
        """Write a file that is whole or not there."""
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with open(descriptor, "wb") as file:  # noqa: PTH123 - of a descriptor
                file.write(data)
            unfinished.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise

    def _failed(self, reason: str) -> None:
        """Count it; log the first of a row of failures."""
        with self._lock:
            self.num_failed += 1
            first, self._failing = not self._failing, True
        if first:
            logger.warning("a bundle could not be written: %s; further failures are only counted", reason)


def _fulfil(future: Future[Result], work: Callable[[], Result]) -> None:
    """Run the work unless nobody waits for it any more."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
        future.set_exception(error)
    else:
        future.set_result(result)


def _bundles_in(directory: Path) -> list[str]:
    """Names of the bundles in a directory, the oldest first. Removes what was left unfinished long ago."""
    found = []
    for entry in os.scandir(directory):
        name, unfinished = entry.name, entry.name.startswith(".")
        stem = name.lstrip(".").partition(".json")[0]
        if _ID.fullmatch(stem) is None or not entry.is_file(follow_symlinks=False):
            continue
        with contextlib.suppress(OSError):
            modified = entry.stat(follow_symlinks=False).st_mtime
            if not unfinished and name == f"{stem}.json":
                found.append((modified, name))
            elif unfinished and time.time() - modified > STALE_SECONDS:
                Path(entry).unlink()
    return [name for _, name in sorted(found)]
