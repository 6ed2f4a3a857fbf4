"""What /metrics shows: counted here, and read from the engine when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from reprise.generation.interface import Engine, EngineState
from reprise.types import ChoiceDelta

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 10)

FAILURES = ("capacity", "forward_error", "internal_error", "no_admissible_token", "numerical_error")
"""Codes of what a choice may fail of in the engine: each is shown before its first."""


class Metrics:
    """One registry for one app. Labels are route templates and statuses: never a client's own words."""

    def __init__(self, engine: Engine, *, num_rejections: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("reprise_requests", "HTTP requests.", ["route", "status"], registry=self._registry)
        self._seconds = Histogram(
            "reprise_http_request_duration_seconds",
            "Time from a request's head to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "reprise_time_to_first_token_seconds",
            "Time from a generation's request to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._inter_token = Histogram(
            "reprise_inter_token_latency_seconds",
            "Time between tokens of a choice, as the API process gets them.",
            buckets=_TOKEN_SECONDS,
            registry=self._registry,
        )
        self._end_to_end = Histogram(
            "reprise_e2e_request_latency_seconds",
            "Time from a generation's request to its end.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(engine, num_rejections))

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def generation(self) -> GenerationTimes:
        """A stopwatch for one request, started now."""
        return GenerationTimes(self._first_token, self._inter_token, self._end_to_end)

    def count(self, name: str, documentation: str, read: Callable[[], int]) -> None:
        """A counter whose value is kept elsewhere: `read` is called when it is asked for."""
        self._registry.register(_Reading(_counter, name, documentation, read))

    def gauge(self, name: str, documentation: str, read: Callable[[], int]) -> None:
        """As `count`, of a value that also falls."""
        self._registry.register(_Reading(_gauge, name, documentation, read))

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class GenerationTimes:
    """When the tokens of one request came."""

    def __init__(self, first_token: Histogram, inter_token: Histogram, end_to_end: Histogram) -> None:
        self._first_token = first_token
        self._inter_token = inter_token
        self._end_to_end = end_to_end
        self._began = time.perf_counter()
        self._last: dict[int, float] = {}

    def delta(self, delta: ChoiceDelta) -> None:
        if not delta.token_ids:
            return
        now = time.perf_counter()
        last = self._last.get(delta.index)
        if last is not None:
            self._inter_token.observe((now - last) / len(delta.token_ids))
        elif not self._last:
            self._first_token.observe(now - self._began)
        self._last[delta.index] = now

    def end(self) -> None:
        self._end_to_end.observe(time.perf_counter() - self._began)


class _Reading:
    def __init__(
        self, make: Callable[[str, str, float], Metric], name: str, documentation: str, read: Callable[[], int]
    ) -> None:
        self._make = make
        self._name = name
        self._documentation = documentation
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        yield self._make(self._name, self._documentation, self._read())


class _EngineCollector:
    def __init__(self, engine: Engine, num_rejections: Callable[[], int]) -> None:
        self._engine = engine
        self._num_rejections = num_rejections

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        stats, info = self._engine.stats, self._engine.info
        num_kv_tokens = info.num_kv_tokens if info is not None else 0
        used = stats.num_kv_tokens_used / num_kv_tokens if num_kv_tokens else 0.0
        yield _gauge("num_requests_running", "Sequences that run.", stats.num_running)
        yield _gauge("num_requests_waiting", "Sequences that wait for a place, or for an engine.", stats.num_waiting)
        yield _gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", used)
        yield _gauge("kv_cache_tokens", "Tokens that the KV cache holds.", num_kv_tokens)
        yield _gauge("kv_cache_reusable_tokens", "Tokens kept for reuse.", stats.num_kv_tokens_cached)
        yield _counter("prompt_tokens", "Tokens of prompts.", stats.num_prompt_tokens)
        yield _counter("cached_prompt_tokens", "Prompt tokens that were reused.", stats.num_cached_tokens)
        yield _counter("generation_tokens", "Generated tokens.", stats.num_generated_tokens)
        yield _counter("draft_tokens", "Tokens that were guessed ahead.", stats.num_draft_tokens)
        yield _counter("kept_draft_tokens", "Of these those that were right.", stats.num_kept_draft_tokens)
        yield _counter("engine_steps", "Steps of the engine.", stats.num_steps)
        yield _counter("engine_step_seconds", "Time spent in steps.", stats.step_seconds)
        yield _counter("num_preemptions", "Sequences that gave up their place.", stats.num_preemptions)
        yield _counter("memory_shortages", "Forwards that ran out of memory.", stats.num_memory_shortages)
        yield _counter("engine_restarts", "Deaths of the engine process.", self._engine.num_restarts)
        yield _counter("engine_hangs", "Engine processes killed because they hung.", self._engine.num_hung)
        yield _counter("choices_recovered", "Choices that went on after a death.", self._engine.num_recovered)
        yield _counter("choices_lost", "Choices that a death of the engine ended.", self._engine.num_lost)
        yield _counter("requests_convicted", "Requests that the engine died of.", self._engine.num_convicted)
        yield _counter("outputs_dropped", "Outputs that were for nobody, or came twice.", self._engine.num_dropped)
        yield _gauge(
            "last_recovery_seconds",
            "From a death of the engine to the next token of a choice, of the latest that went on.",
            self._engine.last_recovery_seconds,
        )
        failed = CounterMetricFamily(
            "reprise_choices_failed",
            "Choices that failed in a living engine, by error code.",
            labels=["code"],
        )
        for code, count in {**dict.fromkeys(FAILURES, 0), **self._engine.num_failed}.items():
            failed.add_metric([code], count)
        yield failed
        yield _counter("admission_rejections", "Requests refused as too many.", self._num_rejections())
        states = GaugeMetricFamily("reprise_engine_state", "1 for the state the engine is in.", labels=["state"])
        for state in EngineState:
            states.add_metric([state.value], float(state is self._engine.state))
        yield states


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"reprise_{name}", documentation, value)


def _counter(name: str, documentation: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"reprise_{name}", documentation, value)
