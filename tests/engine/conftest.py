"""Saved tiny models, one directory an architecture, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from support import tiny_models

WIDTH = 320
ModelDirectory = Callable[[str], Path]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    return _saved(tmp_path_factory, tiny_models.build)


@pytest.fixture(scope="session")
def wide_directory(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    """Models wide enough for the kernels of real ones: with 32 columns every product is summed in one order."""
    return _saved(tmp_path_factory, partial(tiny_models.build, width=WIDTH))


def _saved(tmp_path_factory: pytest.TempPathFactory, build: Callable[[str], PreTrainedModel]) -> ModelDirectory:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name
            build(name).save_pretrained(made[name])
        return made[name]

    return get


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny matrices: more threads only wait for each other."""
    torch.set_num_threads(1)
