from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprise.api import chat
from reprise.api.chat_chunks import ChatChunks, ChatFold
from reprise.api.completion_chunks import CompletionChunks, CompletionFold
from reprise.api.head import ResponseHead
from reprise.api.respond import Fold
from reprise.api.sampling import Served
from reprise.errors import InvalidRequestError
from reprise.protocol.requests import ChatCompletionRequest, CompletionRequest
from reprise.protocol.responses import RepriseExtension, finite
from reprise.text.tokenizer import Tokenizer
from reprise.text.vocabulary import Vocabulary
from reprise.types import ChoiceDelta, FinishReason, GenerationRequest, LogprobEntry, LogprobToken, SamplingParams

HELLO = {"role": "user", "content": "Hello"}


def request(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [HELLO], **fields})


@pytest.fixture
def served(tokenizer: Tokenizer) -> Served:
    return Served(tokenizer=tokenizer, max_sequence_tokens=100, vocab_size=512, max_choices=128, defaults={})


def generation(served: Served, **fields: Any) -> GenerationRequest:
    (found,) = chat.to_generation(request(**fields), served, response_id="chatcmpl-1", seed=7)
    return found


def prompt(served: Served, **fields: Any) -> str:
    ids = generation(served, **fields).prompt_token_ids
    return served.tokenizer.decode(ids, skip_special_tokens=False)


def test_a_chat_is_one_generation(served: Served) -> None:
    found = generation(served, n=3, stop=["x"], top_logprobs=4, logprobs=True, skip_special_tokens=False)
    assert found.request_id == "chatcmpl-1"
    assert found.num_choices == 3
    assert found.sampling.seed == 7
    assert found.sampling.num_logprobs == 4
    assert found.sampling.num_prompt_logprobs is None
    assert found.stop.strings == ("x",)
    assert not found.skip_special_tokens


def test_an_answer_may_fill_the_context(served: Served) -> None:
    found = generation(served)
    assert found.sampling.max_tokens == 100 - len(found.prompt_token_ids)
    assert generation(served, max_completion_tokens=5, max_tokens=50).sampling.max_tokens == 5


def test_messages_become_the_templates_text(served: Served) -> None:
    assert prompt(served) == "<s><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(served, add_generation_prompt=False) == "<s><|im_start|>user\nHello<|im_end|>\n"


def test_parts_are_joined_without_a_character_between(served: Served) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert prompt(served, messages=[{"role": "user", "content": parts}]) == prompt(served)


def test_a_developer_is_a_system_to_templates_that_do_not_know_better(served: Served) -> None:
    found = prompt(served, messages=[{"role": "developer", "content": "Be brief."}, HELLO])
    assert found.startswith("<s><|im_start|>system\nBe brief.<|im_end|>\n")


def test_the_last_message_can_be_continued(served: Served) -> None:
    messages = [HELLO, {"role": "assistant", "content": "I am"}]
    found = prompt(served, messages=messages, continue_final_message=True)
    assert found.endswith("<|im_start|>assistant\nI am")


def test_control_tokens_in_messages_are_text(served: Served) -> None:
    found = generation(served, messages=[{"role": "user", "content": "<|im_end|>"}])
    end = served.tokenizer.encode("<|im_end|>", add_special_tokens=False)[0]
    assert found.prompt_token_ids.count(end) == 1


def test_calls_and_refusals_as_templates_know_them() -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}},
        {"id": "2", "type": "function", "function": {"name": "f", "arguments": '{"a": '}},
        {"id": "3", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}},
        {"id": "4", "type": "function", "function": {"name": "f", "arguments": "[1]"}},
    ]
    messages = [
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": "Yes.", "tool_calls": []},
    ]
    called, result, refused, said = [chat.for_template(message) for message in request(messages=messages).messages]
    arguments = [call["function"]["arguments"] for call in called["tool_calls"]]
    assert arguments == [{"a": [1]}, '{"a": ', "[" * 100_000, "[1]"]
    assert "content" not in called
    assert result == {"role": "tool", "content": "42", "tool_call_id": "1"}
    assert refused == {"role": "assistant", "content": "No."}
    assert said == {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        ({"n": 9}, "n"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"a": 1, "tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens"),
    ],
)
def test_refused_before_rendering(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        chat.check(request(**fields), max_choices=8)
    assert raised.value.param == param


def test_every_argument_of_the_renderer_is_reserved() -> None:
    """A template variable of that name would become an argument: a template of the client's, for one."""
    import inspect

    from transformers import PreTrainedTokenizerBase

    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"kwargs"}
    assert arguments <= chat.RESERVED_TEMPLATE_VARIABLES
    special = {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"}
    assert special <= chat.RESERVED_TEMPLATE_VARIABLES


# ---- the fold -------------------------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8"), max_size=6)
tokens = st.builds(
    lambda text, logprob: LogprobToken(5, text, text.encode(), logprob),
    texts,
    st.floats(max_value=0, allow_nan=False),
)
entries = st.builds(LogprobEntry, tokens, st.lists(tokens, max_size=2))


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, int, list[ChoiceDelta]]:
    """Prompts, choices of each, and the deltas of all in some order that could be."""
    num_prompts, num_choices = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queues = []
    for index in range(num_prompts * num_choices):
        deltas = [
            ChoiceDelta(
                index=index,
                text=draw(texts),
                token_ids=draw(st.lists(st.integers(0, 9), max_size=3)),
                logprobs=draw(st.none() | st.lists(entries, max_size=2)),
                num_cached_tokens=index,
            )
            for _ in range(draw(st.integers(1, 4)))
        ]
        deltas[-1].finish_reason = draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]))
        deltas[-1].stop_reason = draw(st.none() | st.just("stop") | st.just(3))
        queues.append(deltas)
    merged = []
    while queues:
        queue = draw(st.sampled_from(queues))
        merged.append(queue.pop(0))
        if not queue:
            queues.remove(queue)
    return num_prompts, num_choices, merged


def head_of(num_prompts: int, num_choices: int) -> ResponseHead:
    return ResponseHead(
        id="chatcmpl-1",
        created=1,
        model="m",
        system_fingerprint="fp",
        extension=RepriseExtension(7, [], deterministic=True),
        num_prompt_tokens=(4,) * num_prompts,
        num_choices=num_choices,
    )


def folded(fold: Fold[Any], chunks: list[Any]) -> msgspec.Struct:
    for chunk in chunks:
        fold.push(chunk)
    return fold.result()


def as_json(value: object) -> Any:
    return json.loads(msgspec.json.encode(value))


@given(runs(), st.booleans(), st.booleans())
def test_a_chat_response_is_what_a_client_makes_of_its_stream(
    run: tuple[int, int, list[ChoiceDelta]], logprobs: bool, token_ids: bool
) -> None:
    _, num_choices, deltas = run
    wanted = request(logprobs=logprobs, return_token_ids=token_ids)
    chunks = ChatChunks(head_of(1, num_choices), wanted, include_usage=True)
    made = [placed.chunk for delta in deltas for placed in chunks.push(delta)] + [chunks.end()[0].chunk]
    whole, stream = as_json(folded(ChatFold(), made)), [as_json(chunk) for chunk in made]

    content: dict[int, str] = {}
    for chunk in stream:
        for choice in chunk["choices"]:
            index, delta = choice["index"], choice["delta"]
            # The role comes first, and nothing is null.
            assert ("role" in delta) == (index not in content)
            assert None not in delta.values()
            content[index] = content.get(index, "") + delta.get("content", "")
        assert len(chunk["choices"]) == (0 if chunk is stream[-1] else 1)
    assert {choice["index"]: choice["message"]["content"] for choice in whole["choices"]} == content
    for choice in whole["choices"]:
        own = [c for chunk in stream for c in chunk["choices"] if c["index"] == choice["index"]]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert own[-1]["delta"] == {}
        listed = [position for c in own if c["logprobs"] for position in c["logprobs"]["content"]]
        assert listed == (choice["logprobs"] or {"content": []})["content"]
        ids = [i for c in own for i in c.get("token_ids", [])]
        assert ids == choice.get("token_ids", [])
        expected = [i for delta in deltas if delta.index == choice["index"] for i in delta.token_ids]
        assert ids == (expected if token_ids else [])
    assert stream[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == sum(len(delta.token_ids) for delta in deltas)
    assert whole["reprise"] == stream[0]["reprise"]


@pytest.mark.parametrize("tier", [None, "auto", "priority"])
def test_the_tier_that_served_is_said_where_one_was_asked_for(tier: str | None) -> None:
    chunks = ChatChunks(head_of(1, 1), request(service_tier=tier), include_usage=True)
    made = [placed.chunk for placed in chunks.push(ChoiceDelta(index=0, text="a", finish_reason=FinishReason.STOP))]
    made.append(chunks.end()[0].chunk)
    for body in (*map(as_json, made), as_json(folded(ChatFold(), made))):
        assert body.get("service_tier") == (None if tier is None else "default")
        assert ("service_tier" in body) == (tier is not None)


@given(runs(), st.booleans(), st.booleans())
def test_a_completion_is_what_a_client_makes_of_its_stream(
    run: tuple[int, int, list[ChoiceDelta]], logprobs: bool, echo: bool
) -> None:
    num_prompts, num_choices, deltas = run
    prompts = [f"prompt {number}" for number in range(num_prompts)]
    wanted = CompletionRequest.model_validate(
        {"prompt": prompts, "logprobs": 1 if logprobs else None, "echo": echo, "n": num_choices}
    )
    sampling = SamplingParams(seed=1, max_tokens=4)
    made_for = [
        GenerationRequest(request_id=str(i), prompt_token_ids=[5, 6], sampling=sampling) for i in range(num_prompts)
    ]
    chunks = CompletionChunks(
        head_of(num_prompts, num_choices), wanted, made_for, Vocabulary([b"a"] * 10, [], exact=True), include_usage=True
    )
    made = [placed.chunk for delta in deltas for placed in chunks.push(delta)] + [chunks.end()[0].chunk]
    whole, stream = as_json(folded(CompletionFold(), made)), [as_json(chunk) for chunk in made]
    assert [choice["index"] for choice in whole["choices"]] == list(range(num_prompts * num_choices))
    for choice in whole["choices"]:
        index = choice["index"]
        own = [c for chunk in stream for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in own) == choice["text"]
        generated = "".join(delta.text for delta in deltas if delta.index == index)
        assert choice["text"] == (prompts[index // num_choices] if echo else "") + generated
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
        if logprobs:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                joined = [item for c in own if c["logprobs"] for item in c["logprobs"][name]]
                assert joined == choice["logprobs"][name]
                assert len(joined) == len(choice["logprobs"]["tokens"])
    cached = [delta.num_cached_tokens for delta in deltas if delta.index % num_choices == 0 and delta.finish_reason]
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == sum(cached)
    assert whole["usage"]["prompt_tokens"] == 4 * num_prompts


def test_minus_infinity_is_said_in_json() -> None:
    assert finite(float("-inf")) == -9999.0
    assert finite(float("nan")) == -9999.0
    assert finite(-0.5) == -0.5
