"""How much memory there is, and how much of it the KV pool may take."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch

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
