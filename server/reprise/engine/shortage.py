"""Running out of memory in a forward pass: how it is told from a bug, and what can be given back."""

from __future__ import annotations

import gc

import torch

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that memory ran out. torch's CPU allocator raises a RuntimeError like any other."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def release_caches() -> None:
    """Give back what is kept for reuse. To be called after the handler, whose traceback holds on to tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
