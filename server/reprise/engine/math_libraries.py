"""What the libraries behind torch's products on a CPU are asked for, so that a row's sums have one order.

On Intel's CPUs MKL's float32 kernels, and on CPUs with a matrix unit oneDNN's bfloat16 ones, sum in another order with
other numbers of rows, whatever they are multiples of. Both can be told not to, in the environment, which they read at
the first product of the process.
"""

from __future__ import annotations

from collections.abc import MutableMapping

from reprise.engine.native.library import cpu_flags, cpu_vendor


def ask_for_one_order(environ: MutableMapping[str, str], vendor: str, flags: frozenset[str]) -> None:
    """Leaves alone what is set already. vendor, flags: of the CPU, as Linux names them."""
    if vendor == "GenuineIntel":
        # Conditional numerical reproducibility, for the kernels that MKL would take anyway.
        environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    if "amx_tile" in flags:
        environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def ask_for_one_order_here(environ: MutableMapping[str, str]) -> None:
    """The same for this machine's CPU."""
    ask_for_one_order(environ, cpu_vendor(), cpu_flags())
