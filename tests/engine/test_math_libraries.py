"""What MKL and oneDNN are asked for, and that a row's products keep their bits then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.shapes import write_model
from reprise.engine.math_libraries import ask_for_one_order, ask_for_one_order_here
from support.engine_driver import load_from
from support.one_order import ANY_ORDER, any_order, products_repeat

AMX = frozenset({"avx512_bf16", "amx_tile"})
PROGRAM = """
import torch
from torch.nn import functional

for dtype in (torch.float32, torch.bfloat16):
    for inner, columns in ((64, 64), (256, 1000), (576, 1536), (1024, 512)):
        generator = torch.Generator().manual_seed(1)
        x, weight = (torch.randn(size, inner, generator=generator).to(dtype) for size in (256, columns))
        across = weight.t().contiguous()
        for product in (lambda x: functional.linear(x, weight), lambda x: torch.addmm(weight[:1, :1], x, across)):
            whole = product(x)
            for num_rows in range(4, 256, 4):
                if not torch.equal(product(x[:num_rows]), whole[:num_rows]):
                    print(dtype, inner, columns, num_rows)
"""


def test_only_cpus_that_need_it_are_asked_and_settings_of_users_stay() -> None:
    for vendor, flags, expected in (
        ("GenuineIntel", AMX, {"MKL_CBWR": "AUTO,STRICT", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
        ("GenuineIntel", frozenset[str](), {"MKL_CBWR": "AUTO,STRICT"}),
        ("AuthenticAMD", frozenset({"avx512_bf16"}), {}),
        ("", frozenset[str](), {}),
    ):
        environ: dict[str, str] = {}
        ask_for_one_order(environ, vendor, flags)
        assert environ == expected
    environ = {"MKL_CBWR": "AVX2"}
    ask_for_one_order(environ, "GenuineIntel", AMX)
    assert environ["MKL_CBWR"] == "AVX2"


@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_number_of_rows_changes_no_bits(threads: str) -> None:
    """Of multiples of four, in a process whose first products these are."""
    environ = {name: value for name, value in os.environ.items() if name not in ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA")}
    ask_for_one_order_here(environ)
    environ["OMP_NUM_THREADS"] = threads
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == ""


@pytest.mark.parametrize("deterministic", [None, True, False])
def test_an_engine_asks_for_it_unless_it_need_not_repeat(
    deterministic: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ANY_ORDER:
        monkeypatch.delenv(name, raising=False)
    write_model(tmp_path, "tiny")
    load_from(tmp_path, deterministic=deterministic)
    asked: dict[str, str] = {}
    if deterministic is not False:
        ask_for_one_order_here(asked)
    assert {name: os.environ[name] for name in ANY_ORDER if name in os.environ} == asked


@pytest.mark.skipif(not products_repeat(), reason="they run where they stand")
def test_what_moves_is_found_where_products_move() -> None:
    """Tests that this process skips, in one whose libraries are asked for nothing."""
    searches = "finds_torchs or not_filled_up or without_fixed_order or not_to_be_had or layers_names"
    files = ["tests/engine/test_repeatability.py", "tests/benchmarks/test_benchmarks.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files, "-k", searches]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        env={**environ, **any_order()},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "19 passed" in done.stdout
    assert "skipped" not in done.stdout
