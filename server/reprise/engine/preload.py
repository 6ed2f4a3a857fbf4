"""What the fork server imports once, so that an engine process starts in hundredths of a second.

No CUDA context and no threads may come of it: the fork server's children are forks of this.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from reprise.transformers_imports import import_models_package


@contextmanager
def _without_compiler_and_clusters() -> Iterator[None]:
    """Spare transformers torch's compiler and its tensors over many processes: together more than torch itself.

    It only marks functions for the compiler and asks whether the tensors are there. Nothing is compiled here, and a
    model runs in one process.
    """
    name = "torch._dynamo"
    own = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    if name not in sys.modules:
        sys.modules[name] = torch._dynamo = _absent(name)  # noqa: SLF001 # there is no public name
    try:
        yield
    finally:
        torch.distributed.is_available = own
        if getattr(sys.modules[name], "absent", False):
            del sys.modules[name], torch._dynamo  # noqa: SLF001 # as above


def _absent(name: str) -> Any:
    """A package with no code of its own; what is imported from modules in it is real."""
    package: Any = ModuleType(name)
    package.__path__ = [str(Path(torch.__file__).parent / name.partition(".")[2])]
    package.absent = True
    for mark in ("allow_in_graph", "assume_constant_result", "disable"):
        setattr(package, mark, _unmarked)
    return package


def _unmarked(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    return function if function is not None else _unmarked


def _import_transformers() -> None:
    import_models_package()
    for name in ("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)


gc.disable()
try:
    with _without_compiler_and_clusters():
        _import_transformers()
except Exception:  # noqa: BLE001 # another version of transformers asks more of them
    _import_transformers()
importlib.import_module("reprise.engine.process")
gc.freeze()  # all of it stays, in memory that the children share as long as nobody walks through it
gc.enable()
