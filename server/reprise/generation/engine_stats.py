"""The engine's statistics over all of its lives: each life of the process counts from nothing."""

from __future__ import annotations

import msgspec

from reprise.ipc.messages import EngineStats

_GAUGES = ("num_running", "num_waiting", "num_kv_tokens_used", "num_kv_tokens_cached")


def after_death(stats: EngineStats) -> EngineStats:
    """What is left of them where the process is gone: the counters."""
    return msgspec.structs.replace(stats, **dict.fromkeys(_GAUGES, 0))


def in_all(past: EngineStats, present: EngineStats) -> EngineStats:
    """Those of the present life on top of those that `after_death` left."""
    return EngineStats(**{name: getattr(past, name) + getattr(present, name) for name in EngineStats.__struct_fields__})
