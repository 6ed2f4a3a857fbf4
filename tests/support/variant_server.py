"""`reprise serve` with one kernel swapped for a variant of it: `python -m support.variant_server serve ...`.

The variant is torch's own attention over the same keys: the same numbers but for rounding, with an order of summation
that follows the shapes.
"""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
ENVIRON = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *, scale: float, **_: Any) -> Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    group = (-1, query.shape[1], -1, -1)
    keys, values = keys[:, None].expand(group), values[:, None].expand(group)
    return scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale)


def run(sock: socket.socket, parent: int) -> None:
    """The entry point of an engine process, as `generation.engine_entry.run`."""
    from reprise.engine import attention, process

    attention.attend = attend
    process.run_forked(sock, parent)


def main() -> None:
    from reprise import cli, serve
    from support import variant_server

    serve.run = partial(serve.run, engine_entry=variant_server.run)
    cli.main()


if __name__ == "__main__":
    main()
