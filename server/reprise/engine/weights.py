"""What weights are: a fingerprint of every byte, and whether all of them are numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from reprise.errors import ModelLoadError

PIECE_BYTES = 1 << 25
"""What is digested by itself, so that threads share a large tensor."""
_BYTES_AT_ONCE = 1 << 20
"""Read once from memory for both questions."""
_INFINITY = {
    torch.float16: (np.uint16, 0xF800),
    torch.bfloat16: (np.uint16, 0xFF00),
    torch.float32: (np.uint32, 0xFF00_0000),
    torch.float64: (np.uint64, 0xFFE0_0000_0000_0000),
}
"""The bits of infinity, its sign shifted out, in integers of that size: a NaN is more, every number is less."""


def verify_weights(model: nn.Module, report: Callable[[float], None] = lambda _: None) -> str:
    """A fingerprint of all weights. Raises ModelLoadError naming each tensor that holds NaN or infinity.

    SHA-256, for which CPUs have instructions, of pieces that as many threads share as torch has. `report` hears of the
    share done, 0 to 1.
    """
    tensors = sorted(model.state_dict().items())
    pieces = {_place(tensor): list(_pieces(tensor)) for _, tensor in tensors}  # tied weights are read once
    found: dict[tuple[object, ...], list[tuple[bytes, bool]]] = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as executor:
        futures = {place: [executor.submit(_digest, piece) for piece in parts] for place, parts in pieces.items()}
        for index, (place, of_tensor) in enumerate(futures.items(), 1):
            found[place] = [future.result() for future in of_tensor]
            report(index / len(futures))
    digest = hashlib.sha256()
    broken = []
    for name, tensor in tensors:
        parts = found[_place(tensor)]
        if not all(finite for _, finite in parts):
            broken.append(name)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for of_piece, _ in parts:
            digest.update(of_piece)
    if broken:
        raise ModelLoadError(f"weights with NaN or infinite values: {', '.join(broken[:8])}")
    return digest.hexdigest()[:16]


def _place(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors of the same elements have in common."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().contiguous().flatten()
    yield from torch.split(flat, PIECE_BYTES // flat.element_size()) if flat.numel() else ()


def _digest(piece: Tensor) -> tuple[bytes, bool]:
    """Of its bytes, and whether all of it is finite."""
    data = piece.cpu()
    digest = hashlib.sha256()
    finite = True
    if data.dtype not in _INFINITY:
        digest.update(data.view(torch.uint8).numpy().data)
        return digest.digest(), not data.is_floating_point() or bool(torch.isfinite(data.float()).all())
    integer, infinity = _INFINITY[data.dtype]
    bits = data.view(torch.uint8).numpy().view(integer)
    count = _BYTES_AT_ONCE // bits.itemsize
    shifted = np.empty(min(count, bits.size), dtype=integer)
    for first in range(0, bits.size, count):
        part = bits[first : first + count]
        digest.update(part.data)
        np.left_shift(part, 1, out=shifted[: part.size])
        finite = finite and bool(shifted[: part.size].max() < infinity)
    return digest.digest(), finite
