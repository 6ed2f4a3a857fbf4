"""Servers of the tests and benchmarks: their ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.local_server import free_port

ROOT = Path(__file__).resolve().parents[2]
SEVERAL = """
import sys
from benchmarks.local_server import free_port
print(*(free_port() for _ in range(100)), flush=True)
sys.stdin.read()
"""


def test_no_port_is_given_twice() -> None:
    """To several processes, whose servers do not listen yet."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SEVERAL],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for _ in range(3)
    ]
    ports = []
    for process in processes:
        assert process.stdout is not None
        ports += [int(port) for port in process.stdout.readline().split()]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert len(ports) == len(set(ports)) == 300


def test_a_port_that_somebody_listens_on_is_not_given() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"{taken} to {taken} is free"):
            free_port([taken])
    assert free_port([taken]) == taken
