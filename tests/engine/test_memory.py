"""Memory is taken when it is written, and that of files is given back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reprise.engine.memory import MappedFiles, zeros

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
