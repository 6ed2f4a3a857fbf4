"""Each parameter does over HTTP what it says, judged by the model itself, alone and in one batch with all others."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.live_api import COMPLETIONS, Answer, LiveApi, assert_same
from support.reference import Reference

PROMPT = "The quick brown fox"
NUM_TOKENS = 24
SEEDS = range(4)


@pytest.fixture(scope="module")
def reference(llama_directory: Path) -> Reference:
    return Reference(llama_directory)


@pytest.fixture
def prompt(api: LiveApi) -> list[int]:
    return api.tokenize(PROMPT)


def sampled(api: LiveApi, **parameters: Any) -> list[Answer]:
    """Answers of several seeds."""
    fixed = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True, "return_token_ids": True}
    return api.together([(COMPLETIONS, {**fixed, **parameters, "seed": seed}) for seed in SEEDS])


def greedy(api: LiveApi, **parameters: Any) -> list[int]:
    return api.complete(PROMPT, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, **parameters).token_ids


def test_greedy(api: LiveApi, reference: Reference, prompt: list[int]) -> None:
    expected = reference.greedy(prompt, NUM_TOKENS)
    assert greedy(api) == expected
    same = api.complete(PROMPT, max_tokens=NUM_TOKENS, do_sample=False, ignore_eos=True, seed=99)
    assert same.token_ids == expected


@pytest.mark.parametrize(
    "parameters",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 2.0, "logit_bias": {"40": 30, "41": 30, "42": 30}},
        {"frequency_penalty": 1.5, "logit_bias": {"40": 30, "41": 30, "42": 30}},
        {"presence_penalty": -1.0, "frequency_penalty": 0.75, "repetition_penalty": 0.8},
        {"logit_bias": {"40": 100}},
        {"logit_bias": {"40": 3.5, "41": -100}},
        {"allowed_token_ids": [40, 41, 42, 300, 301]},
    ],
    ids="+".join,
)
def test_penalties_biases_and_masks(
    api: LiveApi, reference: Reference, prompt: list[int], parameters: dict[str, Any]
) -> None:
    as_ids = {int(token_id): bias for token_id, bias in parameters.get("logit_bias", {}).items()}
    expected = reference.greedy(prompt, NUM_TOKENS, **(parameters | {"logit_bias": as_ids}))
    found = greedy(api, **parameters)
    assert found == expected
    assert found != greedy(api)
    for name in parameters:
        others = {other: value for other, value in parameters.items() if other != name}
        assert greedy(api, **others) != found, f"{name} has no effect"


def in_top_k(probabilities: torch.Tensor, token_id: int) -> bool:
    return int((probabilities > probabilities[token_id]).sum()) < 3


def in_top_p(probabilities: torch.Tensor, token_id: int) -> bool:
    return float(probabilities[probabilities > probabilities[token_id]].sum()) < 0.3 + 1e-6


def in_min_p(probabilities: torch.Tensor, token_id: int) -> bool:
    return float(probabilities[token_id]) >= 0.4 * float(probabilities.max()) * (1 - 1e-4)


def in_typical_p(probabilities: torch.Tensor, token_id: int) -> bool:
    surprise = -probabilities.log()
    distance = (surprise - (probabilities * surprise).sum()).abs()
    return float(probabilities[distance < distance[token_id] - 1e-5].sum()) < 0.2 + 1e-5


@pytest.mark.parametrize(
    ("parameters", "is_possible"),
    [
        ({"top_k": 3}, in_top_k),
        ({"top_p": 0.3}, in_top_p),
        ({"min_p": 0.4}, in_min_p),
        ({"typical_p": 0.2}, in_typical_p),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_may_be_drawn(
    api: LiveApi,
    reference: Reference,
    prompt: list[int],
    parameters: dict[str, Any],
    is_possible: Callable[[torch.Tensor, int], bool],
) -> None:
    def outliers(answers: list[Answer]) -> int:
        found = 0
        for answer in answers:
            distributions = reference.next_probabilities(prompt, answer.token_ids)
            found += sum(not is_possible(*pair) for pair in zip(distributions, answer.token_ids, strict=True))
        return found

    assert outliers(sampled(api, **parameters)) == 0
    assert outliers(sampled(api)) > 0, "the same draws are within the bounds without the parameter"


@pytest.mark.parametrize("parameters", [{"top_k": 1}, {"top_p": 0}, {"min_p": 1}, {"temperature": 1e-6}])
def test_what_leaves_one_token_is_greedy(api: LiveApi, parameters: dict[str, Any]) -> None:
    expected = greedy(api)
    assert [answer.token_ids for answer in sampled(api, **parameters)] == [expected] * len(SEEDS)


def test_temperature_makes_likely_or_unlikely(api: LiveApi, reference: Reference, prompt: list[int]) -> None:
    def surprise(temperature: float) -> float:
        answers = sampled(api, temperature=temperature)
        total = 0.0
        for answer in answers:
            distributions = reference.next_probabilities(prompt, answer.token_ids)
            total -= float(distributions.gather(1, torch.tensor(answer.token_ids)[:, None]).log().mean())
        return total / len(answers)

    assert surprise(0.3) < surprise(1.0) < surprise(2.0)


def test_seeds(api: LiveApi) -> None:
    first, again = sampled(api), sampled(api)
    assert [answer.token_ids for answer in first] == [answer.token_ids for answer in again]
    assert len({tuple(answer.token_ids) for answer in first}) == len(SEEDS)
    for seed in (-(2**63), 2**63 - 1):
        assert api.complete(PROMPT, seed=seed).seed == seed


def test_a_seed_is_given_and_told(api: LiveApi) -> None:
    response = api.post(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 16})
    told = response.json()["reprise"]["seed"]
    assert response.headers["x-reprise-seed"] == str(told)
    assert api.complete(PROMPT, max_tokens=16, seed=told).text == response.json()["choices"][0]["text"]
    assert api.complete(PROMPT).seed != told


def test_choices_differ_and_do_not_depend_on_their_number(api: LiveApi) -> None:
    five = api.complete(PROMPT, n=5, seed=3, ignore_eos=True).choices
    assert len({tuple(choice.token_ids) for choice in five}) == 5
    assert api.complete(PROMPT, n=2, seed=3, ignore_eos=True).choices == five[:2]
    assert api.complete(PROMPT, seed=3, ignore_eos=True).choices == five[:1]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_new_tokens"])
def test_limits(api: LiveApi, name: str) -> None:
    answer = api.complete(PROMPT, ignore_eos=True, **{name: 7})
    assert (len(answer.token_ids), answer.choices[0].finish_reason) == (7, "length")
    assert answer.usage is not None
    assert answer.usage["completion_tokens"] == 7


def test_end_tokens(api: LiveApi) -> None:
    """A bias makes an end token certain; then `ignore_eos` and `min_tokens` tell."""
    end = api.tokenize("<|im_end|>", add_special_tokens=False)
    assert len(end) == 1
    certain = {"logit_bias": {str(end[0]): 100}, "max_tokens": 6}
    stopped = api.complete(PROMPT, **certain)
    assert (stopped.text, stopped.token_ids) == ("", end)
    assert (stopped.choices[0].finish_reason, stopped.choices[0].stop_reason) == ("stop", None)
    ignored = api.complete(PROMPT, ignore_eos=True, **certain)
    assert (ignored.token_ids, ignored.choices[0].finish_reason) == (end * 6, "length")
    later = api.complete(PROMPT, min_tokens=4, **certain)
    assert len(later.token_ids) == 5
    assert later.token_ids[4:] == end
    assert end[0] not in later.token_ids[:4]


def test_stop_token_ids(api: LiveApi) -> None:
    token_ids = greedy(api)
    stop = token_ids[5]
    answer = api.complete(PROMPT, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, stop_token_ids=[stop])
    assert answer.token_ids == token_ids[: token_ids.index(stop) + 1]
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", stop)


def test_echo(api: LiveApi) -> None:
    without = api.complete(PROMPT, seed=1)
    assert api.complete(PROMPT, seed=1, echo=True).text == PROMPT + without.text
    scored = api.complete(PROMPT, echo=True, max_tokens=0, logprobs=0)
    assert scored.text == PROMPT
    assert scored.token_ids == []


def test_prompt_logprobs_are_the_models(api: LiveApi, reference: Reference, prompt: list[int]) -> None:
    entries = api.complete(PROMPT, echo=True, max_tokens=0, logprobs=0).choices[0].logprobs
    assert entries is not None
    assert len(entries) == len(prompt)
    assert entries[0][1] is None
    logprobs = reference.logits(prompt).log_softmax(-1)
    for position, entry in enumerate(entries[1:]):
        assert math.isclose(entry[1], float(logprobs[position, prompt[position + 1]]), abs_tol=1e-4)


def test_logprobs_are_the_models_whatever_the_parameters(api: LiveApi, reference: Reference, prompt: list[int]) -> None:
    answer = api.complete(PROMPT, seed=2, logprobs=3, temperature=2, top_k=50, presence_penalty=2, ignore_eos=True)
    entries = answer.choices[0].logprobs
    assert entries is not None
    logprobs = reference.next_probabilities(prompt, answer.token_ids).log()
    for row, token_id, (_, logprob, top, _) in zip(logprobs, answer.token_ids, entries, strict=True):
        assert math.isclose(logprob, float(row[token_id]), abs_tol=1e-4)
        assert math.isclose(max(top.values()), float(row.max()), abs_tol=1e-4)


def test_special_tokens(api: LiveApi, prompt: list[int]) -> None:
    bare = api.tokenize(PROMPT, add_special_tokens=False)
    assert prompt[1:] == bare
    assert api.complete(PROMPT, temperature=0).token_ids == api.complete(prompt, temperature=0).token_ids
    without = api.complete(PROMPT, temperature=0, add_special_tokens=False)
    assert without.token_ids == api.complete(bare, temperature=0).token_ids
    assert without.usage is not None
    assert without.usage["prompt_tokens"] == len(prompt) - 1
    start = {"logit_bias": {str(prompt[0]): 100}, "max_tokens": 2}
    assert api.complete(PROMPT, **start).text == ""
    assert api.complete(PROMPT, skip_special_tokens=False, **start).text == "<s><s>"


def test_every_form_of_prompt(api: LiveApi, prompt: list[int]) -> None:
    one = api.complete(PROMPT, seed=4).choices[0]
    other = api.complete("def main():", seed=4).choices[0]
    other_ids = api.tokenize("def main():")
    assert api.complete([PROMPT, "def main():"], seed=4).choices == [one, other]
    assert api.complete(prompt, seed=4).choices == [one]
    assert api.complete([prompt, other_ids], seed=4).choices == [one, other]
    twice = api.complete([PROMPT, "def main():"], seed=4, n=2).choices
    assert [twice[0], twice[2]] == [one, other]


def test_the_empty_prompt_begins_with_the_start_token(api: LiveApi, prompt: list[int]) -> None:
    expected = api.complete(prompt[:1], seed=5).choices
    empties: list[Any] = ["", None, [""], [[]]]
    for empty in empties:
        answer = api.complete(empty, seed=5)
        assert answer.choices == expected
        assert answer.usage is not None
        assert answer.usage["prompt_tokens"] == 1


MIXED: list[dict[str, Any]] = [
    {"seed": 1},
    {"temperature": 0},
    {"do_sample": False, "repetition_penalty": 1.3},
    {"seed": 2, "temperature": 0.5, "top_p": 0.8},
    {"seed": 3, "top_k": 5},
    {"seed": 4, "min_p": 0.1},
    {"seed": 5, "typical_p": 0.4},
    {"seed": 6, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"seed": 7, "logit_bias": {"40": 5, "41": -100}},
    {"seed": 8, "bad_words": ["e", "你"]},
    {"seed": 9, "stop": ["e", "T"]},
    {"seed": 10, "stop": "a", "include_stop_str_in_output": True},
    {"seed": 11, "stop_token_ids": [60, 61, 62, 63, 64]},
    {"seed": 12, "ignore_eos": True, "min_tokens": 10},
    {"seed": 13, "max_tokens": 3},
    {"seed": 14, "use_cache": False},
    {"seed": 15, "n": 3},
    {"seed": 16, "logprobs": 4, "echo": True},
    {"seed": 17, "allowed_token_ids": [40, 41, 42, 43]},
    {"seed": 18, "add_special_tokens": False},
    {"seed": 19, "stream": True, "logprobs": 2},
]


def test_all_parameters_in_one_batch_answer_as_alone(api: LiveApi) -> None:
    fixed = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "return_token_ids": True}
    bodies = [{**fixed, **parameters} for parameters in MIXED]
    alone = [api.answer(COMPLETIONS, body).choices for body in bodies]
    together = [answer.choices for answer in api.together([(COMPLETIONS, body) for body in bodies])]
    for one, other in zip(alone, together, strict=True):
        assert_same(other, one)
