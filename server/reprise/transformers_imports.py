"""transformers imported with less work than it makes of it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any


def import_models_package() -> None:
    """Import `transformers.models`, where the names in it are known from the import of transformers.

    Both read the sources of all models, for the same names.
    """
    transformers = importlib.import_module("transformers")
    utilities: Any = importlib.import_module("transformers.utils.import_utils")
    directory = Path(transformers.__file__ or "").parent / "models"
    own = utilities.define_import_structure

    def define(place: Any, prefix: str | None = None) -> Any:
        if prefix is not None or Path(place) != directory / "__init__.py":
            return own(place, prefix)
        known = own(directory, prefix="models")  # kept since transformers asked for it
        start = "models."
        return {
            backends: {name[len(start) :]: objects for name, objects in names.items() if name.startswith(start)}
            for backends, names in known.items()
        }

    utilities.define_import_structure = define
    try:
        importlib.import_module("transformers.models")
    finally:
        utilities.define_import_structure = own
