"""Which library is loaded on which CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from reprise.engine.native.library import VARIANTS, built_variants, variants_for


def test_the_fastest_that_a_cpu_has_comes_first() -> None:
    assert variants_for("x86_64", VARIANTS["amx"] | {"sse2"}) == ["amx", "avx512bf16", "avx2"]
    assert variants_for("AMD64", VARIANTS["avx512bf16"]) == ["avx512bf16", "avx2"]
    assert variants_for("x86_64", VARIANTS["amx"] - {"amx_bf16"}) == ["avx512bf16", "avx2"]
    assert variants_for("x86_64", frozenset({"sse2"})) == []
    assert variants_for("aarch64", frozenset()) == ["generic"]


@pytest.mark.skipif("amx" not in built_variants(), reason="this CPU has no matrix unit")
def test_where_the_system_forbids_the_matrix_unit_it_is_not_used() -> None:
    """Linux refuses it to a process with a signal stack that could not hold the unit's registers."""
    program = """
import ctypes

class Stack(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

memory = ctypes.create_string_buffer(1 << 12)
stack = Stack(ctypes.addressof(memory), 0, len(memory))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
from reprise.engine.native.library import NativeContext, built_variants
print(built_variants(), NativeContext(1).variant)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["['avx512bf16',", "'avx2']", "avx512bf16"]
