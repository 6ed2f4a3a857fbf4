"""Logging never blocks, and is lines for people or objects for machines."""

from __future__ import annotations

import importlib
import json
import logging
import os
import pty
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest

from reprise.logs import BoundedQueueHandler, JsonFormatter, logging_to, take_over

logger = logging.getLogger("reprise.test")


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def read(reader: int) -> list[str]:
    return os.read(reader, 1 << 20).decode().splitlines()


def test_json_lines_where_nobody_looks() -> None:
    with pipe() as (reader, writer):
        with logging_to(writer):
            logger.info("request %s ended", "cmpl-1", extra={"num_tokens": 3})
            try:
                raise ValueError("broken")
            except ValueError:
                logger.exception("failed")
        first, second = (json.loads(line) for line in read(reader))
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "logger": "reprise.test",
        "message": "request cmpl-1 ended",
        "num_tokens": 3,
    }
    assert second["exception"].endswith("ValueError: broken")


def test_text_lines_on_a_terminal() -> None:
    reader, writer = pty.openpty()
    try:
        with logging_to(writer):
            logger.warning("careful")
            logger.info("message for machines", extra={"plain": "text for people"})
        text = os.read(reader, 4096).decode()
    finally:
        os.close(reader)
        os.close(writer)
    first, second = text.replace("\r\x1b[2K", "").splitlines()
    assert first[8:] == " WARNING careful"
    assert second == "text for people"


@pytest.mark.parametrize(("log_format", "is_json"), [("json", True), ("text", False), ("auto", True)])
def test_the_format_can_be_chosen(log_format: Literal["auto", "text", "json"], is_json: bool) -> None:
    with pipe() as (reader, writer):
        with logging_to(writer, log_format=log_format):
            logger.warning("x")
        (line,) = read(reader)
    assert line.startswith("{") is is_json
    assert line.endswith(" WARNING x") is not is_json


def test_other_libraries_are_quiet_until_they_warn() -> None:
    other = logging.getLogger("some.library")
    with pipe() as (reader, writer):
        with logging_to(writer, level="debug"):
            other.info("chatter")
            logger.debug("ours")
            other.warning("trouble")
        messages = [json.loads(line)["message"] for line in read(reader)]
    assert messages == ["ours", "trouble"]


def test_a_library_with_a_handler_of_its_own_logs_through_ours_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = logging.getLogger("huggingface_hub")
    importlib.import_module("huggingface_hub.utils.logging")
    monkeypatch.setattr(library, "handlers", [logging.StreamHandler()])
    monkeypatch.setattr(library, "propagate", False)
    with pipe() as (reader, writer):
        with logging_to(writer):
            take_over("huggingface_hub")
            logging.getLogger("huggingface_hub.utils._http").warning("trouble")
        assert [json.loads(line)["message"] for line in read(reader)] == ["trouble"]
    assert capsys.readouterr().err == ""


def test_python_warnings_are_logged() -> None:
    with pipe() as (reader, writer):
        with warnings.catch_warnings(), logging_to(writer):
            warnings.simplefilter("always")
            warnings.warn("old way", DeprecationWarning, stacklevel=1)
        (line,) = read(reader)
    assert "old way" in json.loads(line)["message"]


def test_nothing_is_left_changed() -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    with pipe() as (_, writer), logging_to(writer):
        assert root.handlers != before[0]
    assert (root.handlers, root.level) == before


def test_a_reader_that_stalls_blocks_nobody_and_the_drops_are_told() -> None:
    with pipe() as (reader, writer):
        start = time.perf_counter()
        with logging_to(writer, size=100) as handler:
            for _ in range(500):
                logger.info("x" * 1000)
            assert time.perf_counter() - start < 2.0
            assert handler.num_dropped > 0
            received: list[str] = []
            deadline = time.monotonic() + 10
            while not any("were dropped" in line for line in received) and time.monotonic() < deadline:
                received += read(reader)
        told = next(line for line in received if "were dropped" in line)
        assert json.loads(told)["message"].startswith(f"{handler.num_dropped} log records were dropped")


def test_closing_does_not_wait_for_a_reader_that_stalls() -> None:
    with pipe() as (reader, writer):
        start = time.perf_counter()
        with logging_to(writer, size=10):
            for _ in range(100):
                logger.info("x" * 10_000)
        assert time.perf_counter() - start < 5.0
        while len(os.read(reader, 1 << 20)) == 1 << 16:  # let the writer thread end before its pipe is closed
            time.sleep(0.05)


def test_a_reader_that_is_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with logging_to(writer) as handler:
        logger.warning("to nobody")
    os.close(writer)
    assert handler.num_dropped == 1


def test_a_record_that_cannot_be_formatted_is_reported_not_raised(capsys: pytest.CaptureFixture[str]) -> None:
    handler = BoundedQueueHandler(JsonFormatter())
    handler.emit(logging.makeLogRecord({"msg": "%d", "args": ("x",)}))
    assert "Logging error" in capsys.readouterr().err
