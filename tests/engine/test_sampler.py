"""The sampler: every parameter by itself, all of them mixed, log-probabilities, and rows that cannot be sampled."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from reprise.engine.bad_words import BadWordAutomaton
from reprise.engine.native.library import NativeContext, built_variants
from reprise.engine.native.selection import NativeSelection
from reprise.engine.sampler import LOWEST_LOGPROB, Sampler
from reprise.engine.sequence import Sequence
from reprise.types import SamplingParams

VOCAB_SIZE = 61
TOKEN_BYTES = [f"<{i}>".encode() for i in range(VOCAB_SIZE - 4)] + [b" ba", b"d", b"ba", b"bad"]
BA, D, BA_PLAIN, BAD = range(VOCAB_SIZE - 4, VOCAB_SIZE)


Make = Callable[..., Sampler]


@pytest.fixture(params=["torch", "native"])
def make(request: pytest.FixtureRequest) -> Make:
    """A sampler that chooses with torch, or natively."""
    if request.param == "torch":
        return Sampler
    if not built_variants():
        pytest.skip("the native library was not built for this CPU")
    selection = NativeSelection(NativeContext(2))
    return lambda token_bytes=None: Sampler(token_bytes, selection)


def sequence(number: int = 1, output: list[int] | None = None, **sampling: Any) -> Sequence:
    values = {"seed": number, "max_tokens": 100, "temperature": 1.0, **sampling}
    return Sequence(
        number,
        choice_index=0,
        prompt_token_ids=[1, 2, 3],
        sampling=SamplingParams(**values),
        output_token_ids=output or [],
    )


def logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def finite(sampler: Sampler, seq: Sequence, raw: Tensor) -> set[int]:
    """The tokens that may still be chosen."""
    return set(torch.isfinite(sampler.processed([seq], raw)[0]).nonzero()[:, 0].tolist())


def test_the_processed_distribution_equals_transformers_chain(make: Make) -> None:
    """generate()'s own order: repetition penalty, temperature, top-k, top-p, min-p, typical-p."""
    parameters: list[dict[str, Any]] = [
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.7, "min_p": 0.05, "typical_p": 0.8},
        {"repetition_penalty": 1.3, "top_p": 0.5},
        {},
        {
            "temperature": 0.3,
            "top_k": 5,
            "top_p": 0.95,
            "min_p": 0.01,
            "typical_p": 0.9,
            "repetition_penalty": 0.8,
        },
    ]
    raw = logits(len(parameters))
    sequences = [sequence(i + 1, [4, 4, 9], **p) for i, p in enumerate(parameters)]
    actual = make().processed(sequences, raw)
    for row, p in enumerate(parameters):
        chain = LogitsProcessorList()
        if "repetition_penalty" in p:
            chain.append(RepetitionPenaltyLogitsProcessor(p["repetition_penalty"]))
        chain.append(TemperatureLogitsWarper(p.get("temperature", 1.0)))
        if "top_k" in p:
            chain.append(TopKLogitsWarper(int(p["top_k"])))
        if "top_p" in p:
            chain.append(TopPLogitsWarper(p["top_p"]))
        if "min_p" in p:
            chain.append(MinPLogitsWarper(p["min_p"]))
        if "typical_p" in p:
            chain.append(TypicalLogitsWarper(p["typical_p"]))
        expected = chain(torch.LongTensor([sequences[row].token_ids]), torch.FloatTensor(raw[row : row + 1].clone()))
        torch.testing.assert_close(actual[row : row + 1], expected)


def test_a_row_is_sampled_alike_alone_and_in_company(make: Make) -> None:
    parameters: list[dict[str, Any]] = [
        {"top_p": 0.8},
        {"temperature": 0.0},
        {"presence_penalty": 1.5, "frequency_penalty": -0.5},
        {"logit_bias": {7: 5.0}, "top_k": 3},
        {"bad_words": (b"bad",), "min_p": 0.1},
        {"allowed_token_ids": (5, 6, 7)},
        {"min_tokens": 9, "end_token_ids": (0,), "stop_token_ids": (1,)},
    ]
    raw = logits(len(parameters))
    together = make(TOKEN_BYTES).sample([sequence(i, [BA], **p) for i, p in enumerate(parameters)], raw)
    for row, p in enumerate(parameters):
        alone = make(TOKEN_BYTES).sample([sequence(row, [BA], **p)], raw[row : row + 1])
        assert alone == [together[row]]


def test_sampled_frequencies_fit_the_processed_distribution(make: Make) -> None:
    raw = logits(1, seed=5)
    parameters: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.2}
    sampler = make()
    num_draws = 6000
    counts = torch.zeros(VOCAB_SIZE)
    sequences = [sequence(seed, **parameters) for seed in range(num_draws)]
    for sampled in sampler.sample(sequences, raw.expand(num_draws, -1)):
        assert sampled.token_id is not None
        counts[sampled.token_id] += 1
    expected = sampler.processed([sequence(0, **parameters)], raw)[0].softmax(-1) * num_draws
    assert counts[expected == 0].sum() == 0
    kept = expected > 5
    chi_square = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert freedom > 3
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5, (chi_square, freedom)


def test_temperature_zero_is_greedy_after_penalties_and_masks(make: Make) -> None:
    raw = torch.zeros(1, VOCAB_SIZE)
    raw[0, 10], raw[0, 11], raw[0, 12] = 5.0, 4.9, 4.0
    sampler = make()
    assert sampler.sample([sequence(1, temperature=0.0)], raw)[0].token_id == 10
    assert sampler.sample([sequence(2, [10], temperature=0.0, presence_penalty=0.5)], raw)[0].token_id == 11
    assert sampler.sample([sequence(3, temperature=0.0, logit_bias={12: 3.0})], raw)[0].token_id == 12
    assert sampler.sample([sequence(4, temperature=0.0, top_k=1, seed=9)], raw)[0].token_id == 10


def test_the_seed_the_choice_and_the_position_decide_a_draw(make: Make) -> None:
    raw = torch.zeros(1, VOCAB_SIZE)
    base = [make().sample([sequence(1, [5] * i, seed=8)], raw)[0].token_id for i in range(30)]
    assert base == [make().sample([sequence(2, [5] * i, seed=8)], raw)[0].token_id for i in range(30)]
    assert base != [make().sample([sequence(1, [5] * i, seed=9)], raw)[0].token_id for i in range(30)]
    assert len(set(base)) > 10


def test_penalties_count_the_output_and_repetition_the_prompt_too(make: Make) -> None:
    raw = torch.full((1, VOCAB_SIZE), 1.0)
    penalised = make().processed([sequence(1, [9, 9], presence_penalty=0.5, frequency_penalty=0.25)], raw)[0]
    assert penalised[9] == 0.0
    assert penalised[2] == 1.0
    repeated = make().processed([sequence(1, [9, 9], repetition_penalty=2.0)], raw)[0]
    assert repeated[[9, 2, 20]].tolist() == [0.5, 0.5, 1.0]


def test_penalties_keep_up_with_a_growing_output(make: Make) -> None:
    sampler, raw = make(), torch.full((1, VOCAB_SIZE), 1.0)
    seq = sequence(1, [], frequency_penalty=0.25)
    for expected in (1.0, 0.75, 0.5):
        assert float(sampler.processed([seq], raw)[0, 7]) == expected
        seq.token_ids.append(7)


def test_allowed_token_ids_and_end_tokens_before_min_tokens(make: Make) -> None:
    raw = logits(1)
    assert finite(make(), sequence(1, allowed_token_ids=(3, 5)), raw) == {3, 5}
    early = sequence(1, [7], min_tokens=2, end_token_ids=(0,), stop_token_ids=(1,))
    assert finite(make(), early, raw) == set(range(VOCAB_SIZE)) - {0, 1}
    late = sequence(1, [7, 7], min_tokens=2, end_token_ids=(0,), stop_token_ids=(1,))
    assert finite(make(), late, raw) == set(range(VOCAB_SIZE))


def test_a_bad_word_is_barred_in_every_spelling(make: Make) -> None:
    sampler, raw = make(TOKEN_BYTES), logits(1)
    seq = sequence(1, [], bad_words=(b"bad",))
    assert BAD not in finite(sampler, seq, raw)
    assert D in finite(sampler, seq, raw)
    seq.token_ids.append(BA)
    assert D not in finite(sampler, seq, raw)
    seq.token_ids.append(8)
    assert D in finite(sampler, seq, raw)


def test_memory_for_bad_words_is_bounded_once_their_sequences_have_ended() -> None:
    """Each bars as much as a request may bring."""
    sampler, raw = Sampler(TOKEN_BYTES), logits(1)
    for number in range(12):
        words = tuple(bytes([number, letter]) * 64 for letter in range(128))
        seq = sequence(number, bad_words=words)
        sampler.sample([seq], raw)
        sampler.forget(seq)
    held = [found for found in gc.get_objects() if type(found) is BadWordAutomaton]
    assert 0 < sum(automaton._next.nbytes for automaton in held) <= 64 << 20


def test_choices_of_a_request_share_what_their_bad_words_take() -> None:
    sampler = Sampler(TOKEN_BYTES)
    sampler.sample([sequence(number, bad_words=(b"bad",)) for number in range(3)], logits(3))
    used = [constraints.bad_words for constraints in sampler._constraints.values()]
    assert len({automaton for automaton, _ in filter(None, used)}) == 1


def test_logprobs_are_the_models_own_and_ordered(make: Make) -> None:
    raw = logits(2)
    first, second = make().sample(
        [sequence(1, num_logprobs=3, temperature=0.2, top_k=1), sequence(2, num_logprobs=0)], raw
    )
    expected = raw.log_softmax(-1)
    assert first.logprobs is not None
    assert second.logprobs is not None
    assert first.logprobs.logprob == pytest.approx(float(expected[0, first.logprobs.token_id]))
    assert [value for _, value in first.logprobs.top] == pytest.approx(expected[0].topk(3).values.tolist())
    assert second.logprobs.top == []


def test_a_logprob_is_a_number_even_where_the_model_says_never(make: Make) -> None:
    raw = logits(1)
    raw[0, 5] = float("-inf")
    sampled = make().sample([sequence(1, num_logprobs=VOCAB_SIZE)], raw)[0]
    assert sampled.logprobs is not None
    assert sampled.logprobs.top[-1] == (5, LOWEST_LOGPROB)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_of_no_numbers_fails_and_its_neighbour_does_not(make: Make, value: float) -> None:
    raw = logits(2)
    broken = raw.clone()
    broken[0, 13] = value
    good = make().sample([sequence(2)], raw[1:])[0]
    assert [s.error_code for s in make().sample([sequence(1), sequence(2)], broken)] == [
        "numerical_error",
        None,
    ]
    assert make().sample([sequence(1), sequence(2)], broken)[1] == good


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("changes", [{"temperature": 0.7}, {"top_p": 0.5, "top_k": 9}, {"typical_p": 0.5}, {}])
def test_what_is_wrong_with_a_row_does_not_depend_on_its_company(
    make: Make, value: float, changes: dict[str, Any]
) -> None:
    """Beside masks all rows are looked at twice, and else once."""
    raw = logits(3)
    raw[1, 13] = value
    if value < 0:
        raw[1] = value
    barred = sequence(1, allowed_token_ids=(BAD,), bad_words=(b"bad",))
    others = [sequence(2, **changes), sequence(3, **changes)]
    together = make(TOKEN_BYTES).sample([barred, *others], raw)
    assert [sampled.error_code for sampled in together] == ["no_admissible_token", "numerical_error", None]
    for row, alone in enumerate(others, start=1):
        assert make(TOKEN_BYTES).sample([alone], raw[row : row + 1]) == together[row : row + 1]


def test_masks_that_leave_nothing_are_an_error(make: Make) -> None:
    seq = sequence(1, allowed_token_ids=(BAD,), bad_words=(b"bad",))
    assert make(TOKEN_BYTES).sample([seq], logits(1))[0].error_code == "no_admissible_token"


@pytest.mark.parametrize("temperature", [1e-6, 1e-39, 1e-50])
def test_a_temperature_too_small_to_divide_by_is_greedy(make: Make, temperature: float) -> None:
    raw = torch.zeros(1, VOCAB_SIZE)
    raw[0, 7], raw[0, 20], raw[0, 30] = 3.0, 9.0, 8.0
    assert make().sample([sequence(1, temperature=temperature)], raw)[0].token_id == 20


def test_alternatives_are_ranked_alike_whatever_a_neighbour_asks_for(make: Make) -> None:
    """Ties are common in bfloat16; how they fall must not follow the largest number asked for in the batch."""
    raw = logits(2).bfloat16().float().round()
    alone = make().sample([sequence(1, num_logprobs=5, temperature=0.0)], raw[:1])[0]
    for neighbour in (0, 5, 19, 20):
        pair = [sequence(1, num_logprobs=5, temperature=0.0), sequence(2, num_logprobs=neighbour)]
        assert make().sample(pair, raw)[0] == alone


def test_a_row_of_minus_infinity_is_the_models_fault(make: Make) -> None:
    raw = torch.full((1, VOCAB_SIZE), float("-inf"))
    assert make().sample([sequence(1)], raw)[0].error_code == "numerical_error"
