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


@pytest.mark.skipif(not built_variants(), reason="the native library is not built")
def test_threads_that_are_not_to_be_had_are_an_error() -> None:
    """Some of them begin: these end, and the process goes on."""
    program = """
import resource
from pathlib import Path
from reprise.engine.native.library import NativeContext
NativeContext(1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 26), resource.getrlimit(resource.RLIMIT_AS)[1]))
try:
    NativeContext(64)
except RuntimeError as error:
    print(error)
NativeContext(2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "no memory for its threads" in done.stdout
