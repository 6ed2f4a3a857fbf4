from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reprise.errors import BundleError, ConfigError
from reprise.replay import store as store_module
from reprise.replay.bundle import Bundle, read_bundle
from reprise.replay.store import BundleStore
from support.bundles import bundle


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "a" / "bundles"


@pytest.fixture
def store(directory: Path) -> Iterator[BundleStore]:
    made = BundleStore(directory, max_bundles=3)
    yield made
    made.close()


def put(store: BundleStore, *ids: str) -> None:
    for response_id in ids:
        made = bundle(id=response_id)
        store.put(lambda made=made: made)  # type: ignore[misc] # mypy cannot infer a default's type


def get(store: BundleStore, response_id: str) -> Bundle | None:
    """After everything that was put."""
    return asyncio.run(store.get(response_id))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_put_can_be_got_and_read_by_its_owner_alone(store: BundleStore, directory: Path) -> None:
    put(store, "cmpl-1")
    assert get(store, "cmpl-1") == bundle()
    assert read_bundle(directory / "cmpl-1.json") == bundle()
    assert stat.S_IMODE((directory / "cmpl-1.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert (store.num_written, store.num_failed) == (1, 0)


def test_the_oldest_are_removed(store: BundleStore, directory: Path) -> None:
    put(store, "cmpl-1", "cmpl-2", "chatcmpl-3", "cmpl-1", "cmpl-4")
    store.close()
    assert names(directory) == ["chatcmpl-3.json", "cmpl-1.json", "cmpl-4.json"]


def test_those_of_former_runs_count_and_other_files_are_left_alone(store: BundleStore, directory: Path) -> None:
    put(store, "cmpl-1", "cmpl-2", "cmpl-3")
    store.close()
    for age, name in enumerate(("cmpl-2.json", "cmpl-3.json", "cmpl-1.json")):
        os.utime(directory / name, (1000 + age, 1000 + age))
    (directory / "notes.json").write_text("mine")
    (directory / ".cmpl-7.json.1").write_text("begun just now")
    (directory / ".cmpl-8.json.1").write_text("left behind")
    os.utime(directory / ".cmpl-8.json.1", (1000, 1000))
    second = BundleStore(directory, max_bundles=3)
    put(second, "cmpl-4")
    second.close()
    assert names(directory) == [".cmpl-7.json.1", "cmpl-1.json", "cmpl-3.json", "cmpl-4.json", "notes.json"]


@pytest.mark.parametrize(
    "response_id",
    ["cmpl-2", "", "x", "../cmpl-1", "cmpl-../cmpl-1", "/etc/passwd", "cmpl-1.json", "cmpl-1\n", "cmpl-\0",
     "cmpl-" + "1" * 200],
)  # fmt: skip
def test_only_ids_of_responses_are_looked_up(store: BundleStore, response_id: str) -> None:
    put(store, "cmpl-1")
    assert get(store, response_id) is None


def test_a_name_out_of_the_directory_is_never_written(store: BundleStore, directory: Path) -> None:
    put(store, "../cmpl-1")
    store.close()
    assert (store.num_failed, names(directory), names(directory.parent)) == (1, [], ["bundles"])


def test_an_unfinished_files_name_leads_nowhere_else(store: BundleStore, directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    (directory / f".cmpl-1.json.{os.getpid()}").symlink_to(target)
    put(store, "cmpl-1")
    store.close()
    assert target.read_text() == "mine"
    assert store.num_failed == 1


def test_a_damaged_file_is_named(store: BundleStore, directory: Path) -> None:
    (directory / "cmpl-1.json").write_text("{")
    with pytest.raises(BundleError, match=r"cmpl-1\.json is not valid JSON"):
        get(store, "cmpl-1")


def test_a_row_of_failures_is_logged_once_and_ends(
    store: BundleStore, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    shutil.rmtree(directory)
    directory.write_text("a file where the directory was")
    put(store, "cmpl-1", "cmpl-2", "cmpl-3")
    store_is_through(store)
    assert (store.num_written, store.num_failed) == (0, 3)
    assert [record.message for record in caplog.records] == [
        f"a bundle could not be written: {directory}: Not a directory; further failures are only counted"
    ]
    directory.unlink()
    directory.mkdir()
    put(store, "cmpl-4")
    assert get(store, "cmpl-4") is not None
    directory.joinpath("cmpl-4.json").unlink()
    directory.rmdir()
    put(store, "cmpl-5")
    store_is_through(store)
    assert len(caplog.records) == 2


class FullDisk:
    """Takes the place of `os.open` for a directory: it has room for so many files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path, *, room: int, code: int) -> None:
        self.directory = directory
        self.room = room
        self.code = code
        self.num_tries = 0
        self._open = os.open
        monkeypatch.setattr(os, "open", self.open)

    def open(self, path: Path, *arguments: int) -> int:
        self.num_tries += 1
        if len(names(self.directory)) >= self.room:
            raise OSError(self.code, os.strerror(self.code), str(path))
        return self._open(path, *arguments)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_where_the_disk_is_full_the_oldest_make_room(
    store: BundleStore, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    FullDisk(monkeypatch, directory, room=2, code=code)
    put(store, "cmpl-1", "cmpl-2", "cmpl-3", "cmpl-4")
    store.close()
    assert names(directory) == ["cmpl-3.json", "cmpl-4.json"]
    assert (store.num_written, store.num_failed) == (4, 0)
    assert [record.message for record in caplog.records] == [
        f"{directory}: {os.strerror(code)}; the oldest bundles are removed to make room"
    ]


def test_room_that_is_made_is_told_once_until_there_is_room_for_all(
    store: BundleStore, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FullDisk(monkeypatch, directory, room=2, code=errno.ENOSPC)
    put(store, "cmpl-1", "cmpl-2", "cmpl-3")
    store_is_through(store)
    (directory / "cmpl-2.json").unlink()
    put(store, "cmpl-4", "cmpl-5")
    store_is_through(store)
    assert len(caplog.records) == 1
    disk.room = 4
    put(store, "cmpl-6", "cmpl-7", "cmpl-8")
    store_is_through(store)
    disk.room = 2
    put(store, "cmpl-9")
    store.close()
    assert len(caplog.records) == 2


def test_a_disk_that_others_fill_costs_few_bundles(
    store: BundleStore, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, "cmpl-1", "cmpl-2", "cmpl-3")
    store_is_through(store)
    disk = FullDisk(monkeypatch, directory, room=0, code=errno.ENOSPC)
    put(store, "cmpl-4", "cmpl-5", "cmpl-6", "cmpl-7")
    store_is_through(store)
    # What made no room once is not given up again and again.
    assert disk.num_tries == store_module.MAX_TRIES + 3
    assert names(directory) == ["cmpl-3.json"]
    assert (store.num_written, store.num_failed) == (3, 4)
    disk.room = 1
    put(store, "cmpl-8")
    store_is_through(store)
    assert names(directory) == ["cmpl-3.json"]
    disk.room = 2
    put(store, "cmpl-9", "cmpl-1")
    store.close()
    assert names(directory) == ["cmpl-1.json", "cmpl-9.json"]
    assert [record.message for record in caplog.records] == [
        f"{directory}: No space left on device; the oldest bundles are removed to make room",
        f"a bundle could not be written: {directory}: No space left on device; further failures are only counted",
    ]


def test_nothing_is_given_up_for_a_bundle_that_all_others_make_no_room_for(
    store: BundleStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "cmpl-1", "cmpl-2")
    store_is_through(store)
    FullDisk(monkeypatch, directory, room=1, code=errno.ENOSPC)
    store.put(lambda: bundle(id="cmpl-3", parameters={"prompt": "x" * 100_000}))
    store.close()
    assert names(directory) == ["cmpl-1.json", "cmpl-2.json"]


def test_a_large_bundle_takes_the_place_of_several_small_ones(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BundleStore(directory, max_bundles=9)
    put(store, *(f"cmpl-{number}" for number in range(1, 9)))
    store_is_through(store)
    disk = FullDisk(monkeypatch, directory, room=5, code=errno.ENOSPC)
    large = bundle(id="cmpl-9", parameters={"prompt": "x" * 3 * (directory / "cmpl-1.json").stat().st_size})
    store.put(lambda: large)
    store.close()
    assert names(directory) == [f"cmpl-{number}.json" for number in range(5, 10)]
    assert disk.num_tries == 2


def store_is_through(store: BundleStore) -> None:
    asyncio.run(store.get("cmpl-nothing"))


def test_a_failure_that_nobody_foresaw_is_counted_without_its_words(
    store: BundleStore, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Bundle:
        raise RuntimeError("secret prompt")

    store.put(fail)
    store.close()
    assert store.num_failed == 1
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text


def test_a_bundle_that_could_not_be_read_is_not_written(
    store: BundleStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_BUNDLE_BYTES", 100)
    put(store, "cmpl-1")
    store.close()
    assert (store.num_failed, names(directory)) == (1, [])


def test_a_disk_that_is_too_slow_holds_nobody_up(store: BundleStore) -> None:
    go_on = threading.Event()

    def slow() -> Bundle:
        assert go_on.wait(10)
        return bundle()

    began = time.monotonic()
    for _ in range(store_module.MAX_PENDING + 5):
        store.put(slow)
    assert time.monotonic() - began < 5
    assert store.num_failed == 5
    go_on.set()
    store.close()
    assert store.num_written == store_module.MAX_PENDING
    put(store, "cmpl-1")
    assert store.num_written == store_module.MAX_PENDING, "closed"


def test_a_disk_that_hangs_holds_the_end_up_for_a_few_seconds_at_most(
    store: BundleStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "CLOSE_SECONDS", 0.05)
    go_on = threading.Event()

    def hang() -> Bundle:
        assert go_on.wait(60)
        return bundle()

    for _ in range(3):
        store.put(hang)
    began = time.monotonic()
    store.close()
    assert time.monotonic() - began < 5
    assert [record.message for record in caplog.records] == ["3 bundles were not written: the disk is too slow"]
    with pytest.raises(BundleError, match="closed"):
        get(store, "cmpl-1")
    go_on.set()


def test_a_process_ends_though_its_disk_hangs(tmp_path: Path) -> None:
    program = f"""
import threading
from pathlib import Path
from reprise.replay import store

store.CLOSE_SECONDS = 0.05
bundles = store.BundleStore(Path({str(tmp_path)!r}), max_bundles=1)
bundles.put(threading.Event().wait)
bundles.close()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_place_that_cannot_be_written_is_a_setting_at_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"bundle_dir: '.*file/bundles' cannot be written to: Not a directory"):
        BundleStore(tmp_path / "file" / "bundles", max_bundles=1)
    with pytest.raises(ConfigError, match=r"bundle_dir: '.*file' cannot be written to: File exists"):
        BundleStore(tmp_path / "file", max_bundles=1)
