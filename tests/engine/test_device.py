"""Values to the device and back: here without one that anything could wait for."""

from __future__ import annotations

import torch

from reprise.engine.device import Fetch, to_device


def test_what_goes_there_comes_back() -> None:
    device = torch.device("cpu")
    tensors = [to_device([1, 2], device), to_device([[0.5]], device), to_device([], device, torch.int64)]
    assert [tensor.dtype for tensor in tensors] == [torch.int64, torch.float32, torch.int64]
    assert Fetch(tensors).lists() == [[1, 2], [[0.5]], []]
    assert Fetch([]).lists() == []
