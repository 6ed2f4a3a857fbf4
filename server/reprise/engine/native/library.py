"""The native decoder's library: found, loaded, and its C structures as ctypes knows them.

It is compiled when Reprise is installed, once for each instruction set that is worth it (see hatch_build.py); where
there was no compiler there is none, and models run through torch alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

_NO_MEMORY = 1
_OUT_OF_RANGE = 3
_AVX2 = frozenset({"avx2", "fma"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}
VARIANTS = {"amx": _AVX512 | {"amx_tile", "amx_bf16"}, "avx512bf16": _AVX512, "avx2": _AVX2}
"""For x86-64, the fastest first, with the CPU's flags that each needs; elsewhere there is one, «generic»."""


FORMATS = {"none": 0, "int8": 1, "int4": 2}
"""`Format` of decoder.cpp by the setting `quantize`."""


class Matrix(Structure):
    """`Matrix` of decoder.cpp."""

    _fields_ = (("data", c_void_p), ("scales", c_void_p), ("format", c_int64))


class LayerWeights(Structure):
    """`LayerWeights` of decoder.cpp."""

    _fields_ = (
        ("query_key_value", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("query_key_value_bias", c_void_p),
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int64),
    )


class Decoder(Structure):
    """`Decoder` of decoder.cpp."""

    _fields_ = (
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("vocab", c_int64),
        ("num_layers", c_int64),
        ("num_embeddings", c_int64),
        ("num_positions", c_int64),
        ("num_blocks", c_int64),
        ("epsilon", c_float),
        ("scale", c_float),
        ("layers", POINTER(LayerWeights)),
        ("embedding", Matrix),
        ("output", Matrix),
        ("final_norm", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
    )


class Step(Structure):
    """`Step` of decoder.cpp."""

    _fields_ = (
        ("num_spans", c_int64),
        ("block_size", c_int64),
        ("spans", c_void_p),
        ("token_ids", c_void_p),
        ("block_ids", c_void_p),
        ("logits", c_void_p),
    )


class Warp(Structure):
    """`Warp` of sampler.cpp."""

    _fields_ = (("temperature", c_float), ("top_k", c_int32), ("top_p", c_float), ("min_p", c_float))


def _of_first_cpu(name: str) -> str:
    """As Linux tells it; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(name)), "").partition(":")[2].strip()


def cpu_flags() -> frozenset[str]:
    return frozenset(_of_first_cpu("flags").split())


def cpu_vendor() -> str:
    """For example GenuineIntel or AuthenticAMD."""
    return _of_first_cpu("vendor_id")


def library_name(variant: str) -> str:
    return f"decoder-{variant}.so"


def variants_for(machine: str, flags: frozenset[str]) -> list[str]:
    """Those that run on a CPU with these flags, the fastest first."""
    if machine not in ("x86_64", "AMD64"):
        return ["generic"]
    return [name for name, needed in VARIANTS.items() if needed <= flags]


def sources_digest(directory: Path) -> int:
    """Of the C++ sources: a library that was compiled from others is not used."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*directory.glob("*.cpp"), *directory.glob("*.h")]):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "big")


@cache
def load_variant(variant: str) -> ctypes.CDLL | None:
    """The library for that instruction set; None where it was not built from these sources or the system forbids it."""
    directory = Path(__file__).parent
    try:
        library = ctypes.CDLL(str(directory / library_name(variant)))
        library.reprise_sources.restype = c_uint64
        if library.reprise_sources() != sources_digest(directory) or not library.reprise_permitted():
            return None
    except (OSError, AttributeError):
        return None
    library.reprise_create.restype = c_void_p
    library.reprise_create.argtypes = [c_int]
    library.reprise_destroy.restype = None
    library.reprise_destroy.argtypes = [c_void_p]
    library.reprise_packed_bytes.restype = c_int64
    library.reprise_packed_bytes.argtypes = [c_int64, c_int64, c_int64, c_int]
    library.reprise_pack.restype = c_int
    library.reprise_pack.argtypes = [
        *(c_void_p, c_void_p, c_int64, c_int64, c_void_p),
        *(c_int64, c_int64, c_int64, c_void_p, c_int64, c_int),
    ]
    library.reprise_choose.restype = c_int
    library.reprise_choose.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p]
    library.reprise_warp.restype = c_int
    library.reprise_warp.argtypes = [c_void_p, c_void_p, c_int64, c_int64, POINTER(Warp), c_void_p]
    library.reprise_forward.restype = c_int
    library.reprise_forward.argtypes = [c_void_p, POINTER(Decoder), POINTER(Step), c_int]
    return library


def built_variants() -> list[str]:
    """Those that were built and that this CPU runs, the fastest first."""
    return [name for name in variants_for(platform.machine(), cpu_flags()) if load_variant(name) is not None]


class NativeContext:
    """The library with threads of its own. Calls release the interpreter's lock; one runs at a time."""

    def __init__(self, num_threads: int, variant: str | None = None) -> None:
        """variant: one of `built_variants`, by default the fastest. Raises RuntimeError where there is none."""
        self.variant = variant or next(iter(built_variants()), "")
        library = load_variant(self.variant) if self.variant else None
        handle = None if library is None else library.reprise_create(num_threads)
        if library is None or handle is None:
            raise RuntimeError("the native library was not built for this CPU, or has no memory for its threads")
        self.library = library
        self.handle: int = handle

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.library.reprise_destroy(self.handle)


def check_outcome(code: int) -> None:
    """Of a call. Raises MemoryError, IndexError, or RuntimeError for whatever else went wrong."""
    if code == _NO_MEMORY:
        raise MemoryError("the native decoder is short of memory")
    if code == _OUT_OF_RANGE:
        raise IndexError("a step has a token beyond the model's embeddings, or a position or block that there is not")
    if code:
        raise RuntimeError("the native decoder failed")
