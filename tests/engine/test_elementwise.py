"""Elementwise functions: torch's values, and the same bits wherever an element stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 # torch's own convention
from torch import Tensor, nn
from transformers.activations import ACT2FN

from reprise.engine.elementwise import bind_late, fixed_elementwise

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: F.silu(x),  # noqa: PLW0108 # looked up at the call, as models do; so below
    "gelu": lambda x: F.gelu(x),  # noqa: PLW0108
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": lambda x: F.softplus(x),  # noqa: PLW0108
    "mish": lambda x: F.mish(x),  # noqa: PLW0108
    "sigmoid": lambda x: torch.sigmoid(x),  # noqa: PLW0108
    "sigmoid of a tensor": lambda x: x.sigmoid(),
    "rsqrt": lambda x: torch.rsqrt(x * x + 0.1),
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def values(dtype: torch.dtype) -> Tensor:
    """More than two threads' shares of 32,768, and no multiple of what a vector holds."""
    spread = torch.randn(97 * 1001, generator=torch.Generator().manual_seed(3)) * 6
    return torch.cat([spread, torch.tensor([0.0, -0.0, 30.0, -30.0, 100.0, -100.0])]).to(dtype)


def differing(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    in_parts = torch.cat([function(part) for part in torch.split(x, 1003)])
    one_by_one = torch.cat([function(part) for part in torch.split(x[:999], 1)])
    whole = function(x)
    return int((whole != in_parts).sum()) + int((whole[:999] != one_by_one).sum())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_elements_bits_do_not_depend_on_its_place(name: str, dtype: torch.dtype) -> None:
    with fixed_elementwise():
        assert differing(FUNCTIONS[name], values(dtype)) == 0


@pytest.mark.parametrize("name", ["silu", "sigmoid", "gelu", "tanh gelu"])
def test_with_torchs_own_they_do(name: str) -> None:
    """If this fails, torch has mended it on this machine, and the replacement has lost its reason there."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("a CPU without vectors computes every element in one way")
    assert differing(FUNCTIONS[name], values(torch.float32)) > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_values_are_torchs(name: str, dtype: torch.dtype) -> None:
    x = values(dtype)
    expected = FUNCTIONS[name](x)
    with fixed_elementwise():
        found = FUNCTIONS[name](x)
    assert found.dtype is expected.dtype
    assert torch.allclose(found, expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


def test_torch_is_itself_again_afterwards() -> None:
    names: list[tuple[Any, str]] = [(F, "silu"), (F, "gelu"), (torch, "sigmoid"), (Tensor, "sigmoid"), (torch, "rsqrt")]
    before = [getattr(owner, name) for owner, name in names]
    with fixed_elementwise():
        within = [getattr(owner, name) for owner, name in names]
    assert all(function is not torchs for function, torchs in zip(within, before, strict=True))
    with pytest.raises(TypeError), fixed_elementwise():
        F.silu()  # type: ignore[call-arg]  # an error of the model's code, say
    assert [getattr(owner, name) for owner, name in names] == before


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "mish", "silu", "sigmoid", "quick_gelu", "gelu_new"])
def test_activations_of_transformers_are_reached(activation: str) -> None:
    module = nn.Sequential(ACT2FN[activation])
    bind_late(module)
    with fixed_elementwise():
        assert differing(module, values(torch.float32)) == 0
