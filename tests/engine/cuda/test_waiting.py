"""Nothing in a decode step asks the device for a value before the tokens are fetched: it would wait for all before it.

Shown on the CPU by the operations that are called: those that give a value, or a shape that follows values.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reprise.engine.attention import ROW_MULTIPLE
from reprise.engine.cuda.decoder import CudaDecoder, FusedWeights
from reprise.engine.cuda.products import Products, row_buckets
from reprise.engine.cuda.runner import CudaRunner
from reprise.engine.sampler import Sampler
from reprise.engine.scheduler import ScheduledSequence
from reprise.engine.sequence import Sequence, SequenceStatus
from reprise.types import SamplingParams
from support import tiny_models

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2", "is_nonzero"}
PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "num_logprobs": 3},
    {"temperature": 1.0, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 1.0, "presence_penalty": 0.3, "frequency_penalty": 0.2, "logit_bias": {5: 1.0}},
    {"temperature": 1.0, "min_tokens": 6, "end_token_ids": (3,), "allowed_token_ids": (4, 5, 6), "num_logprobs": 0},
]


class Calls(TorchDispatchMode):
    """Notes the names of the operations that wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.waiting.append(name)
        return func(*args, **(kwargs or {}))


def attend_to_nothing(query: Tensor, *_: Any, **__: Any) -> Tensor:
    """In place of the kernel, which there is on CUDA alone."""
    return query


def sequences() -> list[Sequence]:
    made = []
    for index, parameters in enumerate(PARAMETERS):
        sampling = SamplingParams(seed=index, max_tokens=8, **parameters)
        one = Sequence(index, choice_index=0, prompt_token_ids=[7, 8, 9], sampling=sampling)
        one.status = SequenceStatus.RUNNING
        one.block_ids = [2 * index, 2 * index + 1]
        made.append(one)
    return made


def test_the_calls_that_wait_are_seen() -> None:
    with Calls() as calls:
        torch.tensor([1.0]).sum().item()
        torch.tensor([1, 0]).nonzero()
    assert calls.waiting == ["_local_scalar_dense", "nonzero"]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_decode_step_and_the_one_begun_behind_it_wait_for_nothing(name: str) -> None:
    model = tiny_models.build(name)
    decoder = CudaDecoder(
        model, FusedWeights(model, [None, None]), Products(row_buckets(ROW_MULTIPLE, 8)), attend_to_nothing,
        num_blocks=16, block_size=4, max_positions=32,
    )  # fmt: skip
    runner, sampler, running = CudaRunner(decoder, 8), Sampler(), sequences()
    batch = [ScheduledSequence(one, 2, 1) for one in running]
    seen: list[list[str]] = []
    with Calls() as calls:

        def when_drawn(token_ids: Tensor) -> None:
            runner.anticipate(batch, token_ids)
            seen.append(calls.waiting[:])

        drawn = sampler.sample(running, runner.run(batch), None, when_drawn)
    assert all(sampled.token_id is not None for sampled in drawn)
    assert runner._anticipated is not None
    assert seen == [[]]
