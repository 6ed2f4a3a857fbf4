"""Drive an engine core by hand: add requests, step until all have ended, look at what came out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reprise.engine.core import EngineCore
from reprise.engine.loader import LoadedModel, load
from reprise.engine.process import build_core
from reprise.ipc.messages import Add, EngineConfig, SequenceOutput
from reprise.types import FinishReason, SamplingParams, TokenLogprobs
from support.tiny_models import EOS_TOKEN_ID


@dataclass
class Result:
    """Everything that one sequence's outputs said."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error_code: str | None = None
    num_terminal: int = 0

    def take(self, output: SequenceOutput) -> None:
        assert self.finish_reason is None, "an output after the terminal one"
        assert output.position == len(self.token_ids)
        self.token_ids += output.token_ids
        self.logprobs += [entry for entry in output.logprobs or [] if entry is not None]
        self.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            self.stop_token_id = output.stop_token_id
            self.error_code = output.error_code
            self.num_terminal += 1


def greedy(max_tokens: int = 12, **changes: Any) -> SamplingParams:
    values = {
        "seed": 0,
        "temperature": 0.0,
        "max_tokens": max_tokens,
        "end_token_ids": (EOS_TOKEN_ID,),
        **changes,
    }
    return SamplingParams(**values)


def load_from(directory: Path, **config: Any) -> LoadedModel:
    settings = {
        "model": str(directory),
        "device": "cpu",
        "kernels": "torch",
        "block_size": 4,
        "kv_cache_memory": 1 << 20,
        **config,
    }
    return load(EngineConfig(**settings), lambda _stage, _fraction: None)


def run(
    core: EngineCore,
    requests: list[tuple[list[int], SamplingParams]],
    *,
    first_id: int = 1,
    max_steps: int = 3000,
    prediction: list[int] | None = None,
) -> list[Result]:
    """Each request as one sequence, all at once, until all have ended. `prediction`: of each of their outputs."""
    results = {first_id + i: Result() for i in range(len(requests))}
    for sequence_id, (prompt, sampling) in zip(results, requests, strict=True):
        core.add(Add(sequence_id, 0, prompt, sampling, prediction_token_ids=prediction or []))
    drain(core, results, max_steps)
    return list(results.values())


def drain(core: EngineCore, results: dict[int, Result], max_steps: int = 3000) -> None:
    for _ in range(max_steps):
        if not core.has_work:
            break
        for output in core.step():
            results[output.sequence_id].take(output)
        core.check()
    assert not core.has_work
    assert all(result.num_terminal == 1 for result in results.values())


__all__ = ["Result", "build_core", "drain", "greedy", "load_from", "run"]
