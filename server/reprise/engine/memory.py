"""How much memory there is, how much of it the KV pool may take, and memory that is taken when it is written."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from bisect import bisect_right
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

CPU_KV_SHARE = 0.25
"""Share of the free memory that the KV pool takes on a CPU when it is not told its size."""


def kv_budget(device: torch.device, gpu_memory_utilization: float) -> int:
    """Bytes for a KV pool that was given no size. `gpu_memory_utilization`: share of a GPU for everything."""
    if device.type == "cuda":
        # What the gate has used is still in torch's own cache.
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(total * gpu_memory_utilization) - (total - free))
    return int(available_memory() * CPU_KV_SHARE)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def available_memory() -> int:
    """Bytes of main memory that can be had without swapping, a container's limit respected."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        held = int(used.read_text()) - _inactive_file_pages()
        free = min(free, max(0, int(limit.read_text()) - held))
    return free


def _inactive_file_pages() -> int:
    """Bytes of the container's page cache that go when memory is wanted, such as weights just read."""
    statistics = Path("/sys/fs/cgroup/memory.stat")
    if statistics.exists():
        for line in statistics.read_text().splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    return 0


def zeros(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros of which a page is taken when it is first written; an allocator may write its zeros at once.

    The pages are large where the system has such: what reads gigabytes for each token waits for addresses otherwise.
    Raises MemoryError.
    """
    try:
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {size * dtype.itemsize} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that was built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


class Arena:
    """Memory for tensors that are read one after the other, in one piece. `num_bytes`: of them all, each rounded up.

    Raises MemoryError.
    """

    ALIGNMENT = 64

    def __init__(self, num_bytes: int) -> None:
        self._memory = zeros(num_bytes, torch.uint8)
        self._used = 0

    @classmethod
    def rounded(cls, num_bytes: int) -> int:
        """What so many bytes take."""
        return -(-num_bytes // cls.ALIGNMENT) * cls.ALIGNMENT

    def take(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8."""
        start, self._used = self._used, self._used + self.rounded(num_bytes)
        assert self._used <= self._memory.shape[0]
        return self._memory[start : start + num_bytes]


class MappedFiles:
    """The files that are mapped when it is made; on other systems than Linux it knows of none."""

    def __init__(self) -> None:
        self._spans: list[tuple[int, int]] = []
        maps = Path("/proc/self/maps")
        for line in maps.read_text().splitlines() if maps.exists() else ():
            span, _, _, _, inode, *_ = line.split()
            if inode != "0":
                start, end = span.split("-")
                self._spans.append((int(start, 16), int(end, 16)))
        self._starts = [start for start, _ in self._spans]

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor that was there at that time is part of a file."""
        start = tensor.data_ptr()
        index = bisect_right(self._starts, start) - 1
        return index >= 0 and start + tensor.nbytes <= self._spans[index][1]

    def give_back(self, tensor: Tensor) -> None:
        """Take no more memory for a tensor that was there at that time: its pages stay in the page cache alone.

        Whatever was written to it is lost. No effect where it is not part of a file.
        """
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and self.has(tensor):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
