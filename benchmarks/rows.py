"""Whether a row's bits depend on how many rows are computed with it: `linear` on this machine, by its shapes.

The first rows of a product are compared, bit by bit, with those of the product of all rows. The row counts that
differ are printed; the engine computes multiples of 4 only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 # torch's own convention

from benchmarks.report import print_report

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHAPES = [
    (256, 256), (256, 704), (704, 256), (256, 4096), (576, 192), (576, 576), (576, 1536), (1536, 576),
    (576, 49152), (1024, 1024), (1024, 2048), (2048, 1024), (1024, 3072), (3072, 1024),
]  # fmt: skip
ROW_COUNTS = [*range(1, 41), 44, 48, 56, 64, 80, 96, 100, 128, 192, 200, 256, 384, 512, 640, 1000]


def differing_row_counts(columns: int, outputs: int, dtype: torch.dtype, row_counts: Sequence[int]) -> list[int]:
    """The row counts whose product has other bits than the first rows of the largest one."""
    generator = torch.Generator().manual_seed(columns * outputs)
    weight = (torch.randn(outputs, columns, generator=generator) * 0.05).to(dtype)
    rows = torch.randn(max(row_counts) + 24, columns, generator=generator).to(dtype)
    reference = F.linear(rows, weight)
    return [count for count in row_counts if not torch.equal(F.linear(rows[:count], weight), reference[:count])]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rows", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-rows", type=int, default=1000, help="largest number of rows (default: 1000)")
    parser.add_argument("--max-outputs", type=int, default=49152, help="leave out larger products (default: 49152)")
    arguments = parser.parse_args(argv)
    row_counts = [count for count in ROW_COUNTS if count <= arguments.max_rows]
    table = [["columns x outputs", "dtype", "row counts that differ"]]
    found: dict[str, list[int]] = {}
    for name, dtype in DTYPES.items():
        for columns, outputs in SHAPES:
            if outputs <= arguments.max_outputs:
                shape = f"{columns} x {outputs}"
                differing = differing_row_counts(columns, outputs, dtype, row_counts)
                found[f"{name} {shape}"] = differing
                table.append([shape, name, " ".join(map(str, differing)) or "none"])
    odd = sorted({count for differing in found.values() for count in differing if count % 4 == 0})
    print_report(table, {"benchmark": "rows", "differing": found, "multiples_of_4_that_differ": odd})
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
