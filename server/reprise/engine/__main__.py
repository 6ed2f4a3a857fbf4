"""`python -m reprise.engine --fd N`: an engine on an inherited socket, to run by hand under a debugger."""

from __future__ import annotations

import argparse
import socket

from reprise.engine.process import run_engine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reprise.engine", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of a connected stream socket")
    run_engine(socket.socket(fileno=parser.parse_args().fd))


if __name__ == "__main__":
    main()
