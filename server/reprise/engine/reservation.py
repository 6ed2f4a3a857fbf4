"""Memory that an idle engine takes before it is needed."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from torch import Tensor

from reprise.engine.memory import available_memory

logger = logging.getLogger(__name__)


class Reservation:
    """Memory of tensors that is taken before they are written, a little at a time while nothing else is to be done.

    Whoever writes a page first waits until the system has found and cleared it: milliseconds for each of the large ones
    where a virtual machine gets its memory when it is touched. The tensors are filled side by side, so what has
    been taken are the beginnings of them all. It ends early where the system does not know of it, where it would leave
    less than SPARE of the memory at hand, and where memory is not equally near to all cores and better taken by those
    that use it. The tensors must outlive it.
    """

    PIECE = 2 << 20
    """Bytes that are taken at once: a large page."""
    SPARE = 256 << 20
    _PIECES_BETWEEN_LOOKS = 4
    _MADV_POPULATE_WRITE = 23
    _NODES = Path("/sys/devices/system/node")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.device.type == "cpu"]
        self._pieces = self._in_pieces(spans)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.is_complete = not spans or sum(1 for _ in self._NODES.glob("node[0-9]*")) > 1
        """Whether there is nothing left that it would take."""

    def advance(self, seconds: float) -> None:
        """Take memory for about so long."""
        end = time.monotonic() + seconds
        while not self.is_complete and time.monotonic() < end:
            pieces = list(islice(self._pieces, self._PIECES_BETWEEN_LOOKS))
            enough = not pieces or available_memory() >= self.SPARE + len(pieces) * self.PIECE
            error = next(filter(None, (self._take(*piece) for piece in pieces)), 0) if enough else errno.ENOMEM
            if error:
                logger.debug("the rest of the KV pool's memory is taken when it is needed: %s", os.strerror(error))
            self.is_complete = not pieces or error != 0

    @classmethod
    def _in_pieces(cls, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        for offset in range(0, max((end - start for start, end in spans), default=0), cls.PIECE):
            for start, end in spans:
                if start + offset < end:
                    yield start + offset, min(start + offset + cls.PIECE, end)

    def _take(self, start: int, end: int) -> int:
        """Returns the number of the error, or 0."""
        first, last = start // mmap.PAGESIZE * mmap.PAGESIZE, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        if not hasattr(self._libc, "madvise"):
            return errno.ENOSYS
        arguments = (ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(self._MADV_POPULATE_WRITE))
        return ctypes.get_errno() if self._libc.madvise(*arguments) else 0
