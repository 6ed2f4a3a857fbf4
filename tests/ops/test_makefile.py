"""The Makefile: what each target runs, and when it sets up again."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAKE = shutil.which("make") or "make"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose `scripts/setup` and `reprise` only write down how they were called."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "hatch_build.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in (
        "scripts/setup",
        ".venv/bin/reprise",
        ".venv/bin/python",
        ".venv/bin/ruff",
        ".venv/bin/mypy",
    ):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho "{name} $*" >>calls.log\n')
        tool.chmod(0o755)
    return tmp_path


def environment() -> dict[str, str]:
    """This process's own, without what a `make` that runs these tests has put into it."""
    given = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "PORT", "PYTEST_ARGS")
    return {name: value for name, value in os.environ.items() if name not in given}


def make(checkout: Path, *arguments: str) -> list[str]:
    """What a target called."""
    log = checkout / "calls.log"
    log.unlink(missing_ok=True)
    subprocess.run([MAKE, *arguments], cwd=checkout, env=environment(), check=True, capture_output=True, timeout=30)
    return log.read_text().splitlines() if log.exists() else []


def test_serve_sets_up_once_and_serves_the_bundled_model(checkout: Path) -> None:
    assert make(checkout, "serve") == ["scripts/setup serve", ".venv/bin/reprise serve pocket"]
    assert make(checkout, "serve") == [".venv/bin/reprise serve pocket"]


def test_serve_passes_on_model_port_and_arguments(checkout: Path) -> None:
    calls = make(checkout, "serve", "MODEL=some/model", "PORT=8001", "ARGS=--dtype float32 --no-metrics")
    assert calls[1] == ".venv/bin/reprise serve some/model --port 8001 --dtype float32 --no-metrics"


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt", "scripts/setup"])
def test_changed_dependencies_are_installed_again(checkout: Path, changed: str) -> None:
    make(checkout, "serve")
    stamp = checkout / ".venv/.installed-serve"
    later = stamp.stat().st_mtime + 10
    os.utime(checkout / changed, (later, later))
    assert make(checkout, "serve")[0] == "scripts/setup serve"


def test_a_set_up_that_failed_is_tried_again(checkout: Path) -> None:
    (checkout / "scripts/setup").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(subprocess.CalledProcessError):
        make(checkout, "serve")
    assert not (checkout / ".venv/.installed-serve").exists()


def test_test_installs_its_extras_and_runs_pytest(checkout: Path) -> None:
    calls = make(checkout, "test", "PYTEST_ARGS=-q -k x")
    assert calls == ["scripts/setup test", ".venv/bin/python -m pytest -q -k x"]


def test_test_runs_in_parallel_and_ends_with_what_pytest_says_last(checkout: Path) -> None:
    python = checkout / ".venv/bin/python"
    python.write_text('#!/bin/sh\necho ".venv/bin/python $*" >>calls.log\necho "= 3 passed ="\nexit 1\n')
    finished = subprocess.run(
        [MAKE, "test"], cwd=checkout, env=environment(), check=False, capture_output=True, text=True, timeout=30
    )
    assert finished.returncode == 2
    assert finished.stdout.splitlines()[-1] == "= 3 passed ="
    call = (checkout / "calls.log").read_text().splitlines()[-1]
    assert call == ".venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadgroup"


def test_lint_checks_style_format_and_types(checkout: Path) -> None:
    assert make(checkout, "lint") == [
        "scripts/setup lint",
        ".venv/bin/ruff check",
        ".venv/bin/ruff format --check",
        ".venv/bin/mypy ",
    ]


BENCHMARKS = (
    *(
        "floors",
        "use_cache",
        "load",
        "steps",
        "quantization",
        "sampling",
        "speculation",
        "scaling",
        "overhead",
        "startup",
    ),
    "gpu",
)


def test_bench_measures_the_machine_the_server_and_its_peers(checkout: Path) -> None:
    assert make(checkout, "bench", "ARGS=--quick") == [
        "scripts/setup test",
        *(f".venv/bin/python -m benchmarks.{name}" for name in BENCHMARKS),
        ".venv/bin/python -m benchmarks.peers --plot docs/peers.svg --quick",
    ]


def test_peers_are_compared_alone(checkout: Path) -> None:
    calls = make(checkout, "peers", "ARGS=--quick --peers runs/peers")
    assert calls == ["scripts/setup test", ".venv/bin/python -m benchmarks.peers --quick --peers runs/peers"]


def test_clean_removes_the_environment(checkout: Path) -> None:
    make(checkout, "clean")
    assert not (checkout / ".venv").exists()


def test_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = next(line for line in text.splitlines() if line.startswith(".PHONY:")).split()[1:]
    shown = subprocess.run([MAKE, "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in targets:
        assert f"make {target} " in shown
