"""How the process ends."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `reprise serve`."""

    OK = 0
    ENGINE_LOST = 1
    CONFIG = 2
    MODEL = 3
