"""An idle engine takes memory before it is needed, as far as that harms nobody."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.processes import kilobytes
from reprise.engine import reservation as module
from reprise.engine.memory import zeros
from reprise.engine.reservation import Reservation

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells it")
SIZE = 1 << 25


@pytest.fixture(autouse=True)
def one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reservation, "_NODES", tmp_path)


@pytest.fixture
def populates() -> None:
    """Skips where the kernel does not take memory on demand: Linux does from 5.14 on, some sandboxes do not."""
    tensor = zeros(SIZE, torch.uint8)
    if Reservation([])._take(tensor.data_ptr(), tensor.data_ptr() + SIZE):
        pytest.skip("the kernel has no MADV_POPULATE_WRITE")


@pytest.mark.usefixtures("populates")
def test_reserved_memory_is_taken_and_keeps_what_was_written() -> None:
    tensors = [zeros(SIZE, torch.uint8), zeros(SIZE // 2, torch.uint8)]
    tensors[0][5] = 7
    before = kilobytes(os.getpid(), "status", "RssAnon")
    reservation = Reservation(tensors)
    while not reservation.is_complete:
        reservation.advance(0.01)
    assert kilobytes(os.getpid(), "status", "RssAnon") - before > SIZE // 1024
    assert tensors[0][5] == 7
    assert tensors[0].sum() == 7
    assert not tensors[1].any()


class Recorded(Reservation):
    """Takes nothing, and remembers what it was to take. `error`: what the second piece ends with."""

    error = 0

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(tensors)
        self.taken: list[tuple[int, int]] = []

    def _take(self, start: int, end: int) -> int:
        self.taken.append((start, end))
        return self.error if len(self.taken) == 2 else 0


def test_memory_is_taken_from_all_tensors_side_by_side() -> None:
    tensors = [zeros(SIZE, torch.uint8), zeros(Reservation.PIECE + 3, torch.uint8)]
    reservation = Recorded(tensors)
    while not reservation.is_complete:
        reservation.advance(1)
    first, second = (tensor.data_ptr() for tensor in tensors)
    piece = Reservation.PIECE
    assert reservation.taken[:4] == [
        (first, first + piece), (second, second + piece),
        (first + piece, first + 2 * piece), (second + piece, second + piece + 3),
    ]  # fmt: skip
    assert len(reservation.taken) == SIZE // piece + 2
    assert reservation.taken[-1] == (first + SIZE - piece, first + SIZE)


def test_a_reservation_that_has_no_time_takes_nothing() -> None:
    reservation = Recorded([zeros(SIZE, torch.uint8)])
    reservation.advance(0)
    assert not reservation.taken
    assert not reservation.is_complete


def test_a_reservation_ends_where_the_system_refuses() -> None:
    reservation = Recorded([zeros(SIZE, torch.uint8)])
    reservation.error = errno.EINVAL
    reservation.advance(1)
    assert reservation.is_complete
    assert len(reservation.taken) == 2


def test_a_reservation_leaves_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes the last of it is killed by the kernel, not told."""
    left = Reservation.SPARE + 6 * Reservation.PIECE
    reservation = Recorded([zeros(SIZE, torch.uint8)])
    monkeypatch.setattr(module, "available_memory", lambda: left - len(reservation.taken) * Reservation.PIECE)
    reservation.advance(1)
    assert reservation.is_complete
    assert len(reservation.taken) == 4


def test_memory_that_is_not_equally_near_is_left_to_who_uses_it(tmp_path: Path) -> None:
    (tmp_path / "node0").mkdir()
    assert not Reservation([zeros(SIZE, torch.uint8)]).is_complete
    (tmp_path / "node1").mkdir()
    assert Reservation([zeros(SIZE, torch.uint8)]).is_complete


def test_nothing_to_reserve_is_complete_at_once() -> None:
    assert Reservation([]).is_complete
    assert Reservation([torch.empty(3, device="meta")]).is_complete
