"""`reprise serve` whose engine has faults armed: `python -m support.faulty_server FAULTS serve ...`, FAULTS in JSON.

`start_faulty_server` starts it as `benchmarks.local_server.start_server` starts a sound one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import msgspec

from benchmarks.local_server import LocalServer, free_port
from support import faulty_engine
from support.faulty_engine import Fault

ROOT = Path(__file__).resolve().parents[2]


def start_faulty_server(faults: tuple[Fault, ...], *arguments: str, directory: Path) -> LocalServer:
    """Returns while it loads: call `wait_until_ready`, and `stop` at the end."""
    port = free_port()
    log_path = Path(tempfile.mkstemp(prefix="reprise-", suffix=".log", dir=directory)[1])
    variables = {name: value for name, value in os.environ.items() if not name.startswith("REPRISE_")}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    command = [sys.executable, "-m", "support.faulty_server", msgspec.json.encode(faults).decode()]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, "serve", *arguments, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables,
        )
    return LocalServer(process, f"http://127.0.0.1:{port}", log_path)


def main() -> None:
    """Serve with faults: the command line of `reprise`, after the faults."""
    from reprise import cli, serve

    faults = msgspec.json.decode(sys.argv.pop(1), type=tuple[Fault, ...])
    serve.run = partial(serve.run, engine_entry=partial(faulty_engine.run, faults))
    cli.main()


if __name__ == "__main__":
    main()
