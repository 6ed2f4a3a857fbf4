"""These tests need the native library; where it was not built, they say so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from reprise.engine.native.library import built_variants


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skipped only where there was no compiler: with one, a library that is missing is a failure."""
    if built_variants() or any(map(shutil.which, ("c++", "g++", "clang++"))):
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="the native library was not built: there is no C++ compiler"))
