from __future__ import annotations

from typing import Any

import pytest

from reprise.api import completions
from reprise.api.completion_chunks import echoed_texts
from reprise.api.sampling import Served
from reprise.errors import ContextLengthError, InvalidRequestError
from reprise.protocol.requests import CompletionRequest
from reprise.text.tokenizer import Tokenizer
from reprise.types import GenerationRequest

START = 1
"""The id of `<s>`, which this tokenizer puts before a text."""


def request(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate(fields)


@pytest.fixture
def served(tokenizer: Tokenizer) -> Served:
    return Served(tokenizer=tokenizer, max_sequence_tokens=100, vocab_size=512, max_choices=128, defaults={})


def generations(served: Served, **fields: Any) -> list[GenerationRequest]:
    return completions.to_generation(request(**fields), served, response_id="cmpl-1", seed=7)


def test_a_prompt_of_text(served: Served) -> None:
    (found,) = generations(served, prompt="Hi")
    assert found.prompt_token_ids == served.tokenizer.encode("Hi", add_special_tokens=True)
    assert found.prompt_token_ids[0] == START
    assert found.sampling.max_tokens == 16
    (bare,) = generations(served, prompt="Hi", add_special_tokens=False)
    assert bare.prompt_token_ids == found.prompt_token_ids[1:]


def test_ids_are_taken_as_they_are(served: Served) -> None:
    (found,) = generations(served, prompt=[5, 6])
    assert found.prompt_token_ids == [5, 6]


@pytest.mark.parametrize("prompt", ["", None, [""], [[]]])
def test_the_empty_prompt_is_the_start_token(served: Served, prompt: Any) -> None:
    (found,) = generations(served, prompt=prompt)
    assert found.prompt_token_ids == served.tokenizer.start_token_ids == [START]


def test_an_empty_prompt_needs_a_start_token(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.tokenizer, "start_token_ids", [])
    with pytest.raises(InvalidRequestError) as raised:
        generations(served, prompt="")
    assert raised.value.param == "prompt"


def test_prompts_share_a_seed_and_have_names_of_their_own(served: Served) -> None:
    found = generations(served, prompt=["same", "same"], n=2)
    assert [one.sampling.seed for one in found] == [7, 7]
    assert len({one.request_id for one in found}) == 2
    assert found[0].prompt_token_ids == found[1].prompt_token_ids
    assert [one.num_choices for one in found] == [2, 2]


def test_logprobs(served: Served) -> None:
    (plain,) = generations(served, prompt="a", logprobs=3)
    assert (plain.sampling.num_logprobs, plain.sampling.num_prompt_logprobs) == (3, None)
    (echoed,) = generations(served, prompt="a", logprobs=0, echo=True, max_tokens=0)
    assert (echoed.sampling.num_logprobs, echoed.sampling.num_prompt_logprobs) == (0, 0)
    assert echoed.sampling.max_tokens == 0


@pytest.mark.parametrize(("prompt", "param"), [([5, 420], "prompt[1]"), ([[5], [6, 7, 9999]], "prompt[1][2]")])
def test_ids_outside_the_vocabulary(served: Served, prompt: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError, match="0 to 419") as raised:
        generations(served, prompt=prompt)
    assert raised.value.param == param


def test_a_prompt_may_fill_the_context_where_nothing_is_generated(served: Served) -> None:
    assert generations(served, prompt=[5] * 100, max_tokens=0)
    with pytest.raises(ContextLengthError):
        generations(served, prompt=[5] * 100)
    with pytest.raises(ContextLengthError):
        generations(served, prompt=[[5], [5] * 101])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"prompt": ["a"] * 3, "n": 3}, "prompt"),
        ({"n": 9}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 3, "n": 2}, "best_of"),
    ],
)
def test_refused_before_tokenising(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        completions.check(request(**fields), max_choices=8)
    assert raised.value.param == param


@pytest.mark.parametrize("fields", [{"best_of": 1}, {"best_of": 2, "n": 2}, {"best_of": None}, {"suffix": ""}])
def test_what_says_nothing_is_accepted(fields: dict[str, Any]) -> None:
    completions.check(request(**fields), max_choices=8)


def test_echoed_texts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("你好 x", add_special_tokens=True)
    assert echoed_texts(request(prompt="你好"), tokenizer.vocabulary) == ["你好"]
    assert echoed_texts(request(prompt=ids), tokenizer.vocabulary) == ["<s>你好 x"]
    assert echoed_texts(request(), tokenizer.vocabulary) == [""]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [[5] * 90] * 64, "logprobs": 20, "n": 2},
        {"prompt": [[5] * 90] * 128, "logprobs": 20},
    ],
    ids=["choices", "prompts"],
)
def test_echoed_prompts_have_a_bounded_number_of_logprobs(
    served: Served, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_logprobs = 128 * 90 * 21
    monkeypatch.setattr(completions, "MAX_PROMPT_LOGPROBS", num_logprobs)
    assert generations(served, **body, echo=True)
    monkeypatch.setattr(completions, "MAX_PROMPT_LOGPROBS", num_logprobs - 1)
    with pytest.raises(InvalidRequestError, match="11520 tokens of the prompts of all choices have 21") as refused:
        generations(served, **body, echo=True)
    assert (refused.value.param, refused.value.code) == ("logprobs", "too_many_logprobs")
    assert generations(served, **body)
    assert generations(served, **body | {"logprobs": None}, echo=True)
