from __future__ import annotations

from copy import copy
from typing import Any

import msgspec
import pytest

from reprise.api import chat, completions
from reprise.api.sampling import (
    MAX_GENERATED_SEED,
    MAX_IDS_TO_CHECK,
    Served,
    check_request,
    check_size,
    choose_seed,
    ignored_parameters,
    requested_max_tokens,
    resolve_max_tokens,
    resolve_sampling,
    resolve_stop,
)
from reprise.errors import ContextLengthError, InvalidRequestError
from reprise.protocol.requests import ChatCompletionRequest, CompletionRequest
from reprise.text.tokenizer import Tokenizer
from reprise.text.vocabulary import Vocabulary
from reprise.types import SamplingParams, StopStrings


def request(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate(fields)


@pytest.fixture
def served(tokenizer: Tokenizer) -> Served:
    return Served(tokenizer=tokenizer, max_sequence_tokens=100, vocab_size=512, max_choices=128, defaults={})


def resolve(served: Served, **fields: Any) -> SamplingParams:
    return resolve_sampling(request(**fields), served, seed=1, max_tokens=10, num_logprobs=None)


def test_defaults_are_openais(served: Served) -> None:
    assert resolve(served) == SamplingParams(
        seed=1, max_tokens=10, end_token_ids=served.tokenizer.end_token_ids, temperature=1.0
    )


def test_every_field_arrives(served: Served) -> None:
    given = resolve(
        served,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        typical_p=0.75,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={"5": -100, "6": 1.5},
        allowed_token_ids=[7, 5, 7],
        bad_words=["x", " y"],
        stop_token_ids=[9],
        ignore_eos=True,
        min_tokens=3,
        max_tokens=10,
        use_cache=False,
    )
    assert given == SamplingParams(
        seed=1,
        max_tokens=10,
        min_tokens=3,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        typical_p=0.75,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        logit_bias={5: -100.0, 6: 1.5},
        allowed_token_ids=(7, 5),
        bad_words=(b"x", b"y"),
        stop_token_ids=(9,),
        end_token_ids=(),
        use_cache=False,
    )


def test_the_models_own_defaults_hold_where_a_field_is_left_out(tokenizer: Tokenizer) -> None:
    defaults = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.1,
        "typical_p": 0.9,
        "repetition_penalty": 1.1,
    }
    served = Served(tokenizer=tokenizer, max_sequence_tokens=100, vocab_size=512, max_choices=128, defaults=defaults)
    found = resolve(served, top_k=None)
    assert {name: getattr(found, name) for name in defaults} == defaults
    found = resolve(served, temperature=1, top_k=0, top_p=1)
    assert (found.temperature, found.top_k, found.top_p) == (1.0, 0, 1.0)


@pytest.mark.parametrize(
    ("fields", "temperature"),
    [({"do_sample": False}, 0), ({"do_sample": True}, 1), ({"do_sample": False, "temperature": 0}, 0)],
)
def test_do_sample(served: Served, fields: dict[str, Any], temperature: float) -> None:
    check_request(request(**fields))
    assert resolve(served, **fields).temperature == temperature


def test_top_k_is_off_at_minus_one(served: Served) -> None:
    assert resolve(served, top_k=-1).top_k == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"do_sample": False, "temperature": 0.5}, "do_sample"),
        ({"do_sample": True, "temperature": 0}, "do_sample"),
        ({"max_new_tokens": 5, "max_tokens": 4}, "max_new_tokens"),
        ({"max_new_tokens": 5, "max_completion_tokens": 4}, "max_new_tokens"),
    ],
)
def test_conflicts(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        check_request(request(**fields))
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_tokens": 3}, 3),
        ({"max_tokens": 3, "max_completion_tokens": 2}, 2),
        ({"max_new_tokens": 3}, 3),
        ({"max_new_tokens": 3, "max_tokens": 3}, 3),
        ({"max_tokens": 0}, 0),
    ],
)
def test_names_of_the_limit(fields: dict[str, Any], limit: int | None) -> None:
    assert requested_max_tokens(request(**fields)) == limit


@pytest.mark.parametrize(
    ("asked", "num_prompt_tokens", "default", "expected"),
    [
        (None, 10, 16, 16),
        (None, 10, None, 90),
        (5, 10, 16, 5),
        (1000, 10, 16, 90),
        (None, 95, 16, 5),
        (0, 100, 16, 0),
        (7, 99, None, 1),
    ],
)
def test_the_limit_is_lowered_to_the_room(
    served: Served, asked: int | None, num_prompt_tokens: int, default: int | None, expected: int
) -> None:
    found = resolve_max_tokens(request(max_tokens=asked), num_prompt_tokens, served, default=default, param="prompt")
    assert found == expected


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(served: Served) -> None:
    known = msgspec.structs.replace(served, longest_token=8)
    check_size(800, known, param="prompt")
    check_size(10**9, served, param="prompt")
    with pytest.raises(ContextLengthError, match="at least 101") as raised:
        check_size(801, known, param="prompt")
    assert raised.value.param == "prompt"


@pytest.mark.parametrize(("asked", "num_prompt_tokens"), [(None, 100), (1, 100), (0, 101), (5, 1000)])
def test_no_room(served: Served, asked: int | None, num_prompt_tokens: int) -> None:
    with pytest.raises(ContextLengthError) as raised:
        resolve_max_tokens(request(max_tokens=asked), num_prompt_tokens, served, default=16, param="prompt")
    assert raised.value.param == "prompt"
    assert "100" in raised.value.message
    assert str(num_prompt_tokens) in raised.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"420": 1}}, "logit_bias"),
        ({"allowed_token_ids": [1, 420]}, "allowed_token_ids[1]"),
        ({"stop_token_ids": [5, 6, 10**6]}, "stop_token_ids[2]"),
    ],
)
def test_ids_outside_the_vocabulary(served: Served, fields: dict[str, Any], param: str) -> None:
    assert served.num_token_ids == 420
    with pytest.raises(InvalidRequestError, match="0 to 419") as raised:
        resolve(served, **fields)
    assert (raised.value.param, raised.value.code) == (param, "token_id_out_of_range")


def test_bad_words_need_an_exact_vocabulary(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.tokenizer.vocabulary, "exact", False)
    resolve(served)
    with pytest.raises(InvalidRequestError) as raised:
        resolve(served, bad_words=["x"])
    assert (raised.value.param, raised.value.code) == ("bad_words", "unsupported_parameter")


def test_bad_words_know_nothing_of_special_tokens_in_the_text(served: Served) -> None:
    assert resolve(served, bad_words=["x"], skip_special_tokens=True).bad_words == (b"x",)
    with pytest.raises(InvalidRequestError) as raised:
        resolve(served, bad_words=["<|im_end|>"], skip_special_tokens=False)
    assert (raised.value.param, raised.value.code) == ("bad_words", "conflicting_parameters")


def test_a_bad_word_may_be_a_space(served: Served) -> None:
    assert resolve(served, bad_words=[" ", "  a", "a"]).bad_words == (b" ", b"a")


def test_stop() -> None:
    assert resolve_stop(request(stop="a", include_stop_str_in_output=True)) == StopStrings(
        ("a",), include_in_output=True
    )
    assert resolve_stop(request(stop=["a", "b"])) == StopStrings(("a", "b"))
    assert resolve_stop(request(stop=None)) == StopStrings()


def test_seeds() -> None:
    assert choose_seed(request(seed=-(2**63))) == -(2**63)
    chosen = {choose_seed(request()) for _ in range(50)}
    assert len(chosen) == 50
    assert all(0 <= seed < MAX_GENERATED_SEED for seed in chosen)


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({}, []),
        ({"user": "u", "metadata": {"a": "b"}, "store": True}, ["metadata", "store", "user"]),
        ({"store": False, "metadata": {}, "service_tier": "auto"}, []),
        (
            {"service_tier": "priority", "safety_identifier": "s", "prompt_cache_key": "k"},
            ["prompt_cache_key", "safety_identifier", "service_tier"],
        ),
        ({"stream": True, "stream_options": {"include_obfuscation": False}}, []),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, ["stream_options.include_obfuscation"]),
        ({"retain_seconds": 1.5, "user": "u"}, ["retain_seconds", "user"]),
        ({"retain_seconds": 0}, []),
        ({"retain_seconds": 1.5, "stream": True}, []),
    ],
)
def test_ignored_parameters(fields: dict[str, Any], ignored: list[str]) -> None:
    assert ignored_parameters(request(**fields), has_key=False) == ignored


def test_what_a_key_makes_readable_again_may_be_kept() -> None:
    assert ignored_parameters(request(retain_seconds=1.5), has_key=True) == []


def test_ignored_parameters_of_a_chat() -> None:
    fields = {
        "messages": [{"role": "user", "content": "a"}],
        "reasoning_effort": "high",
        "verbosity": "low",
        "parallel_tool_calls": True,
        "prediction": {"type": "content", "content": "x"},
    }
    chat = ChatCompletionRequest.model_validate(fields)
    assert ignored_parameters(chat, has_key=False) == ["parallel_tool_calls", "reasoning_effort", "verbosity"]
    without_guesses = ignored_parameters(chat, has_key=False, guesses=False)
    assert without_guesses == ["parallel_tool_calls", "prediction", "reasoning_effort", "verbosity"]


def test_fields_without_effect_exist() -> None:
    for model in (ChatCompletionRequest, CompletionRequest):
        assert model.NO_EFFECT.keys() <= model.model_fields.keys()


def test_min_tokens_is_never_lowered(served: Served) -> None:
    def most(num_prompt: int, default: int | None, **fields: Any) -> int:
        return resolve_max_tokens(request(**fields), num_prompt, served, default=default, param="prompt")

    assert most(10, 16, min_tokens=40) == 40
    assert most(10, 16, min_tokens=4) == 16
    assert most(10, None, min_tokens=90) == 90
    for default, fields in (
        (16, {"min_tokens": 91}),
        (None, {"min_tokens": 91}),
        (16, {"min_tokens": 91, "max_tokens": 95}),
    ):
        with pytest.raises(ContextLengthError, match="min_tokens") as refused:
            most(10, default, **fields)
        assert refused.value.param == "min_tokens"


def test_masks_that_leave_no_first_token(served: Served) -> None:
    vocabulary, (end, *_) = served.tokenizer.vocabulary, served.tokenizer.end_token_ids
    token_id = served.tokenizer.encode("x", add_special_tokens=False)[0]
    spelt = vocabulary.data(token_id).decode()
    refused_ones: list[dict[str, Any]] = [
        {"allowed_token_ids": [end], "min_tokens": 3},
        {"allowed_token_ids": [end, token_id], "stop_token_ids": [token_id], "min_tokens": 3},
        {"allowed_token_ids": [token_id], "bad_words": [spelt]},
        {"allowed_token_ids": [token_id, end], "bad_words": [spelt], "min_tokens": 1},
    ]
    for fields in refused_ones:
        with pytest.raises(InvalidRequestError) as refused:
            resolve(served, **fields)
        assert (refused.value.param, refused.value.code) == ("allowed_token_ids", "no_admissible_token")
    accepted: list[dict[str, Any]] = [
        {"allowed_token_ids": [end]},
        {"allowed_token_ids": [end], "bad_words": [spelt]},
        {"allowed_token_ids": [end], "min_tokens": 3, "ignore_eos": True},
        {"allowed_token_ids": [token_id], "bad_words": [spelt * 2]},
    ]
    for fields in accepted:
        resolve(served, **fields)


def test_no_more_ids_are_compared_with_bad_words_than_takes_a_moment(tokenizer: Tokenizer) -> None:
    """The engine finds out about more."""

    class Counted(bytes):
        num_comparisons = 0

        def __contains__(self, word: Any) -> bool:
            Counted.num_comparisons += 1
            return super().__contains__(word)

    served = Served(tokenizer=copy(tokenizer), max_sequence_tokens=9, vocab_size=5000, max_choices=128, defaults={})
    served.tokenizer.vocabulary = Vocabulary([Counted(b"a b")] * 5000, [], exact=True)
    words = ["b", *(chr(ord("A") + n) for n in range(25))]
    with pytest.raises(InvalidRequestError, match="leaves no token"):
        resolve(served, allowed_token_ids=[*range(MAX_IDS_TO_CHECK)], bad_words=words[::-1])
    assert Counted.num_comparisons == MAX_IDS_TO_CHECK * len(words)
    assert resolve(served, allowed_token_ids=[*range(5000)], bad_words=words[::-1]).allowed_token_ids is not None
    assert Counted.num_comparisons == MAX_IDS_TO_CHECK * len(words)


def test_what_all_prompts_share_is_resolved_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def resolve_once(*args: Any, **kwargs: Any) -> SamplingParams:
        calls.append(kwargs["max_tokens"])
        return resolve_sampling(*args, **kwargs)

    monkeypatch.setattr(completions, "resolve_sampling", resolve_once)
    body = request(prompt=["a", "b c", "a" * 95], max_tokens=9, allowed_token_ids=[5], bad_words=["x"])
    made = completions.to_generation(body, served, response_id="r", seed=1)
    assert calls == [9]
    assert [one.sampling.max_tokens for one in made] == [min(9, 100 - len(one.prompt_token_ids)) for one in made]


def test_bad_words_are_bounded_together(served: Served) -> None:
    words = [f"{number:0512}" for number in range(33)]
    assert len(resolve(served, bad_words=words[:32]).bad_words) == 32
    with pytest.raises(InvalidRequestError, match="16896 bytes") as raised:
        resolve(served, bad_words=words)
    assert (raised.value.param, raised.value.code) == ("bad_words", "too_many_values")


def test_text_with_tokens_that_the_model_does_not_have(served: Served) -> None:
    """As where a token was added to the tokenizer and the model was never made larger."""
    ids = served.tokenizer.encode("Hello x", add_special_tokens=False)
    small = msgspec.structs.replace(served, vocab_size=max(ids))
    spelt = served.tokenizer.vocabulary.data(max(ids)).decode()
    messages = [{"role": "user", "content": "Hello x"}]
    chats: list[dict[str, Any]] = [
        {"messages": messages},
        {"messages": [messages[0] | {"content": "a"}], "prediction": {"type": "content", "content": "Hello x"}},
    ]
    for param, body in zip(("messages", "prediction.content"), chats, strict=True):
        with pytest.raises(InvalidRequestError) as refused:
            chat.to_generation(ChatCompletionRequest.model_validate(body), small, response_id="r", seed=1)
        assert (refused.value.param, refused.value.code) == (param, "token_id_out_of_range")
    for prompt in ("Hello x", ["a", "Hello x"]):
        with pytest.raises(InvalidRequestError, match=f"token {max(ids)}, '{spelt}'"):
            completions.to_generation(request(prompt=prompt), small, response_id="r", seed=1)
    none = msgspec.structs.replace(served, vocab_size=0)
    with pytest.raises(InvalidRequestError, match="Invalid 'prompt': its text has token"):
        completions.to_generation(request(prompt=""), none, response_id="r", seed=1)


def test_an_answer_ends_with_tokens_that_can_be_sampled(served: Served) -> None:
    ends = served.tokenizer.end_token_ids
    assert resolve(served).end_token_ids == ends
    small = msgspec.structs.replace(served, vocab_size=max(ends))
    assert resolve(small).end_token_ids == tuple(token_id for token_id in ends if token_id != max(ends))
