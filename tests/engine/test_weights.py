"""The fingerprint sees every bit of every weight, and every weight that is no number is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reprise.engine import weights
from reprise.engine.weights import verify_weights
from reprise.errors import ModelLoadError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZE = 1003


class Weights(nn.Module):
    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of a tensor of SIZE, each read in several parts."""
    monkeypatch.setattr(weights, "PIECE_BYTES", 800)
    monkeypatch.setattr(weights, "_BYTES_AT_ONCE", 48)


def extreme(dtype: torch.dtype) -> Tensor:
    """Numbers all of them, the largest and the smallest included."""
    limits = torch.finfo(dtype)
    ends = torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal, -0.0], dtype=dtype)
    return torch.cat([ends, torch.randn(SIZE - len(ends), generator=torch.Generator().manual_seed(1)).to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_is_found_wherever_it_is(dtype: torch.dtype) -> None:
    tensor = extreme(dtype)
    verify_weights(Weights(a=tensor))
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 5, 499, SIZE - 1):
            broken = tensor.clone()
            broken[place] = value
            with pytest.raises(ModelLoadError, match=r"NaN or infinite values: broken$"):
                verify_weights(Weights(a=tensor, broken=broken))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32, torch.float8_e4m3fn], ids=str)
def test_every_bit_counts(dtype: torch.dtype) -> None:
    tensor = (torch.arange(SIZE) % 7).to(torch.float32).to(dtype)
    found = {verify_weights(Weights(a=tensor))}
    for place in range(0, tensor.nbytes, 97):
        changed = tensor.clone()
        changed.view(torch.uint8)[place] ^= 1
        found.add(verify_weights(Weights(a=changed)))
    assert len(found) == 1 + len(range(0, tensor.nbytes, 97))


def test_names_shapes_and_formats_count_and_threads_do_not() -> None:
    tensor = torch.zeros(6, 4)
    models = [
        Weights(a=tensor),
        Weights(b=tensor),
        Weights(a=tensor.view(4, 6)),
        Weights(a=tensor.to(torch.int32)),
        Weights(a=tensor, b=torch.zeros(0)),
        Weights(a=tensor, b=torch.zeros(0, 1)),
    ]
    found = [verify_weights(model) for model in models]
    assert len(set(found)) == len(models)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert [verify_weights(model) for model in models] == found
    finally:
        torch.set_num_threads(num_threads)


def test_tied_weights_are_read_once_and_count_under_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    digest = weights._digest

    def counted(piece: Tensor) -> tuple[bytes, bool]:
        read.append(piece.numel())
        return digest(piece)

    monkeypatch.setattr(weights, "_digest", counted)
    tensor = extreme(torch.float32)
    tied = verify_weights(Weights(a=tensor, b=tensor))
    assert sum(read) == SIZE
    assert tied == verify_weights(Weights(a=tensor, b=tensor.clone()))
    assert tied != verify_weights(Weights(a=tensor))


def test_rows_that_do_not_lie_one_after_the_other() -> None:
    tensor = extreme(torch.float32)[:1000].view(10, 100)
    assert verify_weights(Weights(a=tensor.T)) == verify_weights(Weights(a=tensor.T.contiguous()))


def test_progress_reaches_the_end() -> None:
    heard: list[float] = []
    verify_weights(Weights(a=torch.ones(3), b=torch.ones(SIZE)), heard.append)
    assert heard == [0.5, 1.0]
