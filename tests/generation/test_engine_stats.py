"""What is counted goes on over the lives of the engine, what is measured does not."""

from __future__ import annotations

import msgspec

from reprise.generation.engine_stats import after_death, in_all
from reprise.ipc.messages import EngineStats


def test_counters_go_on_and_gauges_begin_anew() -> None:
    numbers = dict(enumerate(EngineStats.__struct_fields__, 1))
    life = EngineStats(**{name: number for number, name in numbers.items()})
    two_lives = msgspec.structs.asdict(in_all(after_death(life), life))
    once = {name for number, name in numbers.items() if two_lives[name] == number}
    twice = {name for number, name in numbers.items() if two_lives[name] == 2 * number}
    assert once == {"num_running", "num_waiting", "num_kv_tokens_used", "num_kv_tokens_cached"}
    assert once | twice == {*EngineStats.__struct_fields__}
    assert in_all(EngineStats(), life) == life
    assert in_all(after_death(life), EngineStats()) == after_death(life)
