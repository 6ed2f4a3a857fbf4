"""Keeps torch out of a process that only handles text."""

from __future__ import annotations

import logging
import sys
from typing import Any, cast


def keep_torch_out() -> None:
    """Make `import torch` fail in this process from now on; nothing happens where torch is imported already.

    transformers imports torch with its tokenizers wherever it is installed (its `configuration_utils` needs
    it for rope factors), and has no switch for it. Measured with transformers 5.23 and torch 2.13 on CPU:
    `from transformers import AutoTokenizer` takes 2.5 s and 244 MiB with torch, 0.7 s and 62 MiB without.

    For a process's entry point to call, not for a library: afterwards transformers knows no models here.
    Child processes that start a fresh interpreter (spawn, forkserver) are not affected.
    """
    if "torch" in sys.modules:
        return
    cast("dict[str, Any]", sys.modules)["torch"] = None
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
