"""Memory is taken when it is written, and that of files is given back."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reprise.engine import memory
from reprise.engine.memory import MappedFiles, Reservation, zeros

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells it")
SIZE = 1 << 25


def resident(kind: str) -> int:
    """Bytes of this process, by the name that the kernel has for them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def test_zeros_take_no_memory_until_they_are_written() -> None:
    before = resident("RssAnon")
    tensor = zeros(SIZE // 4, torch.float32)
    assert resident("RssAnon") - before < SIZE // 8
    assert tensor.dtype == torch.float32
    assert not tensor.any()
    tensor += 1
    assert resident("RssAnon") - before > SIZE // 2
    assert (tensor == 1).all()


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
    before = resident("RssAnon")
    reservation = Reservation(tensors)
    while not reservation.is_complete:
        reservation.advance(0.01)
    assert resident("RssAnon") - before > SIZE
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
    monkeypatch.setattr(memory, "available_memory", lambda: left - len(reservation.taken) * Reservation.PIECE)
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


def test_more_than_there_is_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        zeros(1 << 60, torch.uint8)


def test_memory_of_a_file_is_given_back_and_read_again(tmp_path: Path) -> None:
    saved = torch.arange(SIZE // 4)
    save_file({"a": saved, "b": saved.clone()}, tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        first, second = file.get_tensor("a"), file.get_tensor("b")
    assert torch.equal(first, saved)
    assert torch.equal(second, saved)
    files = MappedFiles()
    before = resident("RssFile")
    files.give_back(first)
    assert before - resident("RssFile") > first.nbytes // 2
    assert torch.equal(first, saved)
    assert torch.equal(second, saved)


def test_memory_of_its_own_is_left_alone() -> None:
    tensor = torch.ones(SIZE // 4)
    files = MappedFiles()
    assert not files.has(tensor)
    files.give_back(tensor)
    assert (tensor == 1).all()
