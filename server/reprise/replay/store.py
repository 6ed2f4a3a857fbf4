"""The directory that a server writes bundles to: one file a response, the oldest removed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reprise.errors import BundleError, ConfigError
from reprise.replay.bundle import MAX_BUNDLE_BYTES, Bundle, encode, read_bundle

MAX_PENDING = 64
"""Bundles that wait to be written; beyond it they are dropped, for the disk is too slow."""
STALE_SECONDS = 3600
"""Age at which a file that was never completed is removed."""
_ID = re.compile(r"(?:chatcmpl|cmpl)-[A-Za-z0-9_-]{1,100}")

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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reprise-bundles")
        self._places = threading.BoundedSemaphore(MAX_PENDING)
        self._lock = threading.Lock()
        self._failing = False
        self.num_written = 0
        self.num_failed = 0
        """Responses that have no bundle, for whatever reason."""

    def put(self, make: Callable[[], Bundle]) -> None:
        """Have a bundle made and written, both in the thread. Never raises and never waits."""
        if not self._places.acquire(blocking=False):
            self._failed(f"{MAX_PENDING} of them wait to be written")
            return
        try:
            self._thread.submit(self._write, make)
        except RuntimeError:  # closed
            self._places.release()

    async def get(self, response_id: str) -> Bundle | None:
        """The bundle of a response, after all that were put before; None where there is none. Raises BundleError."""
        if _ID.fullmatch(response_id) is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, response_id)

    def close(self) -> None:
        """Write what was put. Waits for it."""
        self._thread.shutdown(wait=True)

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
            self._replace(self._path(bundle.id), data)
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
            self._places.release()

    def _replace(self, path: Path, data: bytes) -> None:
        """Write a file that is whole or not there, and remove the oldest ones beyond the limit."""
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
        self._names.pop(path.name, None)
        self._names[path.name] = None
        while len(self._names) > self._max_bundles:
            oldest = next(iter(self._names))
            (self._directory / oldest).unlink(missing_ok=True)
            del self._names[oldest]

    def _failed(self, reason: str) -> None:
        """Count it; log the first of a row of failures."""
        with self._lock:
            self.num_failed += 1
            first, self._failing = not self._failing, True
        if first:
            logger.warning("a bundle could not be written: %s; further failures are only counted", reason)


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
