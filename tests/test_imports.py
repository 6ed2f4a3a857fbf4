"""Imports point one way, and the API process does not import the engine."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import reprise

ROOT = Path(reprise.__file__).parent
COMMON = {"reprise", "types", "errors"}
ALLOWED = {
    "types": set(),
    "errors": set(),
    "alignment": set(),
    "ipc": {"types"},
    "protocol": {"types", "errors"},
    "text": {"types", "errors"},
    "generation": {"text", "ipc", "types", "errors"},
    "engine": {"ipc", "types", "errors", "alignment"},
    "replay": {"generation", "ipc", "types", "errors", "printable", "reprise"},
    "api": {
        *("protocol", "generation", "text", "ipc", "types", "errors", "alignment"),
        *("settings", "config", "replay", "reprise"),
    },
}
ENTRY_POINTS = {("generation/engine_entry.py", "engine")}
"""The one function that a forked engine process begins with."""


def imported(path: Path) -> set[str]:
    """The parts of the package that a module imports, wherever in the module it does so."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "reprise":
            parts = node.module.split(".")
            names.update([parts[1]] if len(parts) > 1 else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            names.update(a.name.split(".")[1] for a in node.names if a.name.startswith("reprise."))
    return {name if name in ALLOWED or (ROOT / f"{name}.py").exists() else "reprise" for name in names}


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part: str) -> None:
    files = sorted((ROOT / part).rglob("*.py")) if (ROOT / part).is_dir() else [ROOT / f"{part}.py"]
    assert files
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        for target in imported(path) - {part}:
            assert target in ALLOWED[part] or (name, target) in ENTRY_POINTS, f"{name} imports {target}"


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import reprise.cli, sys; print([m for m in ('torch', 'transformers', 'fastapi') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_api_process_imports_nothing_of_the_engine() -> None:
    code = "import reprise.serve, sys; print([m for m in sys.modules if m.startswith('reprise.engine')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
