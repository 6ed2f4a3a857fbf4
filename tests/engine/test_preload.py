"""What the fork server imports, and what it spares: loading a model must not bring it in after all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SPARED = ("sympy", "torch._inductor", "torch._dynamo.symbolic_convert", "torch.distributed.tensor", "torch.onnx")


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", f"import sys\nimport reprise.engine.preload\n{code}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window"])
def test_a_model_of_the_llama_family_is_loaded_without_what_is_spared(
    name: str, model_directory: Callable[[str], Path]
) -> None:
    code = (
        "from reprise.engine.loader import load\n"
        "from reprise.ipc.messages import EngineConfig\n"
        "loaded = load(EngineConfig(model=sys.argv[1], device='cpu', kv_cache_memory=1 << 20), lambda *_: None)\n"
        f"print(loaded.ready.tier, loaded.ready.deterministic, [m for m in {SPARED} if m in sys.modules])"
    )
    assert run(code, str(model_directory(name))) == "paged True []"


def test_the_compiler_is_there_for_who_asks_for_it() -> None:
    code = (
        "import torch\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item(), torch._dynamo.is_compiling())\n"
    )
    assert run(code) == "2.0 False"


def test_models_are_found_by_the_names_that_transformers_has_for_them() -> None:
    names = "from transformers import models\nprint(*sorted(models.__all__))"
    plain = subprocess.run([sys.executable, "-c", names], capture_output=True, text=True, check=True, timeout=120)
    assert len(plain.stdout.split()) > 1000
    assert run(names) == plain.stdout.strip()
    found = "import transformers\nprint(transformers.models.gpt2.modeling_gpt2.GPT2Model is transformers.GPT2Model)"
    assert run(found) == "True"


def test_the_garbage_collector_is_on_and_leaves_alone_what_was_imported() -> None:
    code = "import gc\nprint(gc.isenabled(), gc.get_freeze_count() > 100_000)"
    assert run(code) == "True True"
