"""The padded tier where answers must repeat: how often a prompt is computed to be scored, and what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reprise.engine import alone_runner
from reprise.engine.alone_runner import AloneRunner
from reprise.engine.scheduler import ScheduledSequence
from reprise.engine.sequence import Sequence, SequenceStatus
from reprise.types import SamplingParams
from support import tiny_models

NUM_TOKENS = 60
CHUNK = 7
ROW_BYTES = 4 * tiny_models.VOCAB_SIZE


@pytest.fixture(scope="module", params=["bloom", "mamba"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_models.build(request.param)


@pytest.fixture
def lengths(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens of each forward that is run."""
    seen: list[int] = []

    def note(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        seen.append(named["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def scored(number: int) -> Sequence:
    """A running sequence whose prompt is to be scored."""
    generator = torch.Generator().manual_seed(number)
    sequence = Sequence(
        number,
        choice_index=0,
        prompt_token_ids=torch.randint(4, tiny_models.VOCAB_SIZE, (NUM_TOKENS,), generator=generator).tolist(),
        sampling=SamplingParams(seed=0, max_tokens=4, num_prompt_logprobs=2),
    )
    sequence.status = SequenceStatus.RUNNING
    return sequence


def chunks(sequence: Sequence, length: int = CHUNK) -> list[ScheduledSequence]:
    starts = range(0, NUM_TOKENS, length)
    return [ScheduledSequence(sequence, start, min(length, NUM_TOKENS - start)) for start in starts]


def whole(model: PreTrainedModel, sequence: Sequence) -> Tensor:
    """Logits of all tokens of the prompt, computed in one step."""
    return AloneRunner(model).run(chunks(sequence, NUM_TOKENS))


def test_a_prompt_is_scored_by_one_forward_however_it_is_cut(model: PreTrainedModel, lengths: list[int]) -> None:
    sequence = scored(1)
    expected = whole(model, sequence)
    once = [*lengths]
    lengths.clear()
    runner = AloneRunner(model)
    rows = [runner.run([chunk]) for chunk in chunks(sequence)]
    assert torch.equal(torch.cat(rows), expected)
    assert sorted(lengths) == sorted(once) == [NUM_TOKENS] * 2


def test_what_is_kept_of_a_prompt_is_bounded(
    model: PreTrainedModel, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two more chunks fit than the one that a forward is for: 9 chunks are scored by 3."""
    monkeypatch.setattr(alone_runner, "KEPT_LOGITS_BYTES", (2 * CHUNK + 3) * ROW_BYTES)
    sequence = scored(1)
    expected = whole(model, sequence)
    lengths.clear()
    runner, rows = AloneRunner(model), []
    for chunk in chunks(sequence):
        rows.append(runner.run([chunk]))
        if runner._rows is not None:
            assert runner._rows.logits.untyped_storage().nbytes() <= alone_runner.KEPT_LOGITS_BYTES
    assert torch.equal(torch.cat(rows), expected)
    assert lengths == [NUM_TOKENS] * (3 + 1)
    assert runner._rows is None


def test_prompts_that_are_scored_side_by_side_keep_their_own_rows(model: PreTrainedModel) -> None:
    pair = scored(1), scored(2)
    expected = [whole(model, sequence) for sequence in pair]
    runner = AloneRunner(model)
    rows = [runner.run([*both]) for both in zip(*map(chunks, pair), strict=True)]
    firsts, seconds = zip(*(torch.chunk(of_both, 2) for of_both in rows), strict=True)
    assert torch.equal(torch.cat(firsts), expected[0])
    assert torch.equal(torch.cat(seconds), expected[1])


def test_a_prompt_that_begins_anew_has_the_same_rows(model: PreTrainedModel) -> None:
    sequence = scored(1)
    expected = whole(model, sequence)
    runner = AloneRunner(model)
    for chunk in chunks(sequence)[:4]:
        runner.run([chunk])
    assert torch.equal(torch.cat([runner.run([chunk]) for chunk in chunks(sequence, 11)]), expected)


def test_rows_of_a_sequence_that_lost_its_place_are_dropped(model: PreTrainedModel) -> None:
    runner, sequence = AloneRunner(model), scored(1)
    runner.run(chunks(sequence)[:1])
    assert runner._rows is not None
    runner.forget(sequence)
    assert runner._rows is None
    runner.run(chunks(sequence)[:1])
    sequence.status = SequenceStatus.WAITING
    other = scored(2)
    runner.run(chunks(other)[:0])
    assert runner._rows is None
