"""Whether torch's products repeat by themselves here: then nothing is found where our own measures are left out."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.nn import functional

from reprise.engine.math_libraries import ask_for_one_order_here

ANY_ORDER = {"MKL_CBWR": "AUTO", "ONEDNN_MAX_CPU_ISA": "ALL"}


def any_order() -> dict[str, str]:
    """The environment in which the libraries of this machine choose by the number of rows."""
    asked: dict[str, str] = {}
    ask_for_one_order_here(asked)
    return {name: ANY_ORDER[name] for name in asked}


@cache
def products_repeat() -> bool:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(64, 320, generator=generator) for _ in range(2))
    whole = functional.linear(x, weight)
    return all(torch.equal(functional.linear(x[:rows], weight), whole[:rows]) for rows in range(1, 64))


def need_products_that_do_not_repeat() -> None:
    """Skips the test where this process keeps one order for any number of rows, as MKL can on Intel's CPUs."""
    if products_repeat():
        pytest.skip("the libraries below torch keep one order of summation here")
