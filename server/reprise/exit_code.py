"""How the process ends."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `reprise serve`.

    1 is work that was lost: the engine's, for good, or that of requests which a shutdown had to cut off.
    """

    OK = 0
    ENGINE_LOST = 1
    CONFIG = 2
    MODEL = 3
