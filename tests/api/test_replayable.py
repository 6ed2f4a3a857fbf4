from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import operator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from reprise.api import chat, completions
from reprise.api.replayable import check_replayable
from reprise.api.sampling import Served
from reprise.api.validation import parse
from reprise.errors import BundleError
from reprise.protocol.requests import ChatCompletionRequest, CompletionRequest
from reprise.replay.bundle import Choice, Generation, Recording, convert, encode
from reprise.replay.report import make_report, render
from reprise.text.tokenizer import Tokenizer
from reprise.types import GenerationRequest, StopStrings
from support.bundles import TEXT, bundle
from support.scripted_engine import READY

EVERYTHING: dict[str, Any] = {
    "seed": -(2**63), "max_tokens": 20, "min_tokens": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01,
    "typical_p": 0.95, "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5,
    "logit_bias": {"40": -1.5}, "allowed_token_ids": [40, 41, 42, 43], "bad_words": [" é", "x"], "stop_token_ids": [43],
    "ignore_eos": True, "use_cache": False, "stop": ["a", "b"], "include_stop_str_in_output": True,
    "n": 3,
}  # fmt: skip
MESSAGES = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def served(tokenizer: Tokenizer) -> Served:
    size = tokenizer.vocabulary.size
    return Served(tokenizer=tokenizer, max_sequence_tokens=64, vocab_size=size, max_choices=8, defaults={"top_k": 5})


def recorded(*requests: GenerationRequest) -> list[Generation]:
    return [
        Generation(
            request=request,
            choices=[Choice(token_ids=[], text="", finish_reason=None) for _ in range(request.num_choices)],
        )
        for request in requests
    ]


def of_completion(served: Served, **body: Any) -> list[GenerationRequest]:
    request = parse(CompletionRequest, msgspec.json.encode({"prompt": "Hello", **body}))
    return completions.to_generation(request, served, response_id="cmpl-1", seed=request.seed or 0)


@pytest.mark.parametrize(
    "body",
    [
        {},
        EVERYTHING,
        {"skip_special_tokens": False},
        {"prompt": ["a", "b"], "n": 2},
        {"prompt": [5, 6]},
        {"prompt": ""},
        {"echo": True, "logprobs": 3, "max_tokens": 0},
        {"echo": True},
        {"logprobs": 0, "temperature": 0},
        {"max_tokens": 100_000},
    ],
    ids=str,
)
def test_what_a_completion_asks_for_can_be_asked_again(served: Served, body: dict[str, Any]) -> None:
    requests = of_completion(served, **body)
    assert check_replayable(recorded(*requests), served) == requests


@pytest.mark.parametrize(
    "body",
    [
        {},
        EVERYTHING,
        {"skip_special_tokens": False},
        {"logprobs": True, "top_logprobs": 20},
        {"logprobs": True},
        {"max_tokens": 3},
    ],
    ids=str,
)
def test_what_a_chat_asks_for_can_be_asked_again(served: Served, body: dict[str, Any]) -> None:
    request = parse(ChatCompletionRequest, msgspec.json.encode(MESSAGES | body))
    requests = chat.to_generation(request, served, response_id="chatcmpl-1", seed=7)
    assert check_replayable(recorded(*requests), served) == requests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2**63}, "'seed'"),
        ({"max_tokens": 0, "min_tokens": 1}, "'min_tokens'"),
        ({"max_tokens": 60}, "its 'max_tokens' is 60, and here it would be 5"),
        ({"max_tokens": -1}, "'max_tokens'"),
        ({"temperature": math.nan}, "'temperature': must be a finite number"),
        ({"temperature": -1.0}, "'temperature'"),
        ({"temperature": 1e300}, "'temperature'"),
        ({"top_p": 1.5}, "'top_p'"),
        ({"top_k": -1}, "its 'top_k' is -1, and here it would be 0"),
        ({"typical_p": 0.0}, "'typical_p'"),
        ({"repetition_penalty": 0.0}, "'repetition_penalty'"),
        ({"presence_penalty": 1e9}, "'presence_penalty'"),
        ({"logit_bias": {10**9: 1.0}}, "'logit_bias'"),
        ({"logit_bias": {-1: 1.0}}, "'logit_bias"),
        ({"logit_bias": {1: math.inf}}, "'logit_bias"),
        ({"allowed_token_ids": ()}, "'allowed_token_ids'"),
        ({"allowed_token_ids": (10**6,)}, "'allowed_token_ids[0]'"),
        ({"bad_words": (b"\xff",)}, "can't decode byte"),
        ({"bad_words": (b"",)}, "'bad_words"),
        ({"bad_words": (b"x" * 1024,) * 129}, "'bad_words'"),
        ({"end_token_ids": (10**9,)}, "its 'end_token_ids' is (1000000000,)"),
        ({"stop_token_ids": (-1,)}, "'stop_token_ids[0]'"),
        ({"stop_token_ids": tuple(range(129))}, "'stop_token_ids'"),
        ({"num_logprobs": 10**6}, "'logprobs'"),
        ({"num_prompt_logprobs": 3}, "its 'num_prompt_logprobs' is 3, and here it would be None"),
    ],
    ids=str,
)  # fmt: skip
def test_parameters_out_of_range_are_refused(served: Served, changes: dict[str, Any], message: str) -> None:
    (request,) = of_completion(served, max_tokens=5, prompt=[5] * 59)
    sampling = msgspec.structs.replace(request.sampling, **changes)
    with pytest.raises(BundleError) as caught:
        check_replayable(recorded(msgspec.structs.replace(request, sampling=sampling)), served)
    assert str(caught.value).startswith("generations[0].request of the bundle cannot be run here: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_token_ids": []}, "'prompt': must have at least 1 item"),
        ({"prompt_token_ids": [-1]}, "'prompt[0]'"),
        ({"prompt_token_ids": [2**70]}, "'prompt[0]'"),
        ({"prompt_token_ids": [10**6]}, "'prompt[0]'"),
        ({"prompt_token_ids": [5] * 65}, "context is 64 tokens"),
        ({"stop": StopStrings(("",))}, "'stop"),
        ({"stop": StopStrings(("a",) * 17)}, "'stop'"),
        ({"stop": StopStrings(("a" * 1025,))}, "'stop"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_so_are_prompts_and_stop_strings(served: Served, changes: dict[str, Any], message: str) -> None:
    (request,) = of_completion(served)
    with pytest.raises(BundleError) as caught:
        check_replayable(recorded(request, msgspec.structs.replace(request, **changes)), served)
    assert str(caught.value).startswith("generations[1].request of the bundle cannot be run here: ")
    assert message in str(caught.value)


def predicted(served: Served, text: str = "Hello there") -> GenerationRequest:
    """A chat that says what its answer is expected to be."""
    body = MESSAGES | {"prediction": {"type": "content", "content": text}}
    request = parse(ChatCompletionRequest, msgspec.json.encode(body))
    (made,) = chat.to_generation(request, served, response_id="chatcmpl-1", seed=7)
    return made


def test_a_prediction_is_carried_over(served: Served) -> None:
    request = predicted(served)
    assert request.prediction_token_ids
    assert check_replayable(recorded(request), served) == [request]


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([5] * 65, "'prediction_token_ids': it has 65 tokens, and this server takes 64"),
        ([5, -1], "'prediction_token_ids[1]'"),
        ([10**6], "'prediction_token_ids[0]'"),
        ([2**70], "'prediction_token_ids[0]'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_predictions_that_no_client_could_send_are_refused(served: Served, token_ids: list[int], message: str) -> None:
    request = msgspec.structs.replace(predicted(served), prediction_token_ids=token_ids)
    with pytest.raises(BundleError) as caught:
        check_replayable(recorded(request), served)
    assert str(caught.value).startswith("generations[0].request of the bundle cannot be run here: ")
    assert message in str(caught.value)


def test_predictions_have_a_limit_in_a_long_context_too(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    request = predicted(served)
    limit = len(request.prediction_token_ids) - 1
    monkeypatch.setattr(chat, "MAX_PREDICTION_TOKENS", limit)
    with pytest.raises(BundleError, match=f"'prediction_token_ids': .* this server takes {limit}"):
        check_replayable(recorded(request), served)


@pytest.mark.parametrize("num_choices", [0, -1, 129])
def test_so_are_numbers_of_choices(served: Served, num_choices: int) -> None:
    (request,) = of_completion(served)
    request = msgspec.structs.replace(request, num_choices=num_choices)
    choices = [Choice(token_ids=[], text="", finish_reason=None)]
    generation = Generation(request=msgspec.structs.replace(request, num_choices=1), choices=choices)
    generation.request = request
    with pytest.raises(BundleError, match=r"'n'|129 choices"):
        check_replayable([generation], served)


def test_there_are_at_most_as_many_choices_as_a_request_may_have(served: Served) -> None:
    requests = of_completion(served, prompt=["a"] * 3, n=3)
    with pytest.raises(BundleError, match="has 9 choices, and this server makes at most 8"):
        check_replayable(recorded(*requests), served)


NASTY: list[Any] = [None, True, 0, -1, 2**31, 2**63, 2**70, 1e308, math.nan, math.inf, -0.0, "", "x", "\ud800",
                    "a" * 2000, [], {}, [[]], [1], ["a"], {"a": 1}, [0] * 5000]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path in a JSON value."""
    below = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in below for place in places(value, (*path, key)))]


DOCUMENT = json.loads(encode(bundle()))
DOCUMENT["generations"][0]["request"]["sampling"] |= {"end_token_ids": [], "max_tokens": 3}


def as_sent(document: Any) -> Any:
    """What the server reads of it. Raises ValueError for what is no JSON."""
    return from_json(json.dumps(document), allow_inf_nan=True)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=400, derandomize=True
)
@given(changes=st.lists(st.tuples(st.sampled_from(places(DOCUMENT)[1:]), st.sampled_from(NASTY)), max_size=2))
def test_whatever_a_bundle_says_it_is_refused_or_run_and_reported(
    served: Served, changes: list[tuple[tuple[Any, ...], Any]]
) -> None:
    document = copy.deepcopy(DOCUMENT)
    for path, value in changes:
        with contextlib.suppress(KeyError, IndexError, TypeError):
            functools.reduce(operator.getitem, path[:-1], document)[path[-1]] = value
    try:
        made = convert(as_sent(document), source="it")
        requests = check_replayable(made.generations, served)
    except (BundleError, ValueError):
        assert changes
        return
    found = Recording(requests).finish()
    info, spell = READY, served.tokenizer.vocabulary.data
    report = make_report(made, found, None, info=info, text=TEXT, spell=spell)
    assert render(report)
    assert msgspec.json.encode(report)
