"""Every field of every request has a bound, takes null for its default, and keeps JSON's types apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from reprise.protocol.parameters import Request
from reprise.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

MODELS = [ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest]
MINIMAL: dict[type[Request], dict[str, Any]] = {
    ChatCompletionRequest: {"messages": [{"role": "user", "content": "Hello"}]},
    CompletionRequest: {},
    TokenizeRequest: {"prompt": "Hello"},
    DetokenizeRequest: {"tokens": [1, 2]},
}
GENERATION = [ChatCompletionRequest, CompletionRequest]


def unbounded(schema: dict[str, Any], where: str) -> Iterator[str]:
    """Places in a JSON schema that some value could blow up."""
    for keyword in ("anyOf", "oneOf", "allOf"):
        for number, part in enumerate(schema.get(keyword, [])):
            yield from unbounded(part, f"{where}/{keyword}{number}")
    if "$ref" in schema or "const" in schema or "enum" in schema:
        return
    kind = schema.get("type")
    if kind == "string" and "maxLength" not in schema:
        yield f"{where}: string without maxLength"
    if kind in ("number", "integer"):
        low = "minimum" in schema or "exclusiveMinimum" in schema
        if not low or "maximum" not in schema:
            yield f"{where}: number without minimum and maximum"
    if kind == "array":
        if "maxItems" not in schema:
            yield f"{where}: array without maxItems"
        yield from unbounded(schema["items"], f"{where}[]")
    if kind == "object":
        if "properties" in schema:
            if schema.get("additionalProperties") is not False:
                yield f"{where}: object that takes unknown members"
            for name, member in schema["properties"].items():
                yield from unbounded(member, f"{where}.{name}")
        elif "maxProperties" not in schema:
            yield f"{where}: object without maxProperties"
    if kind is None and not {"anyOf", "oneOf", "allOf"} & schema.keys():
        yield f"{where}: anything at all"


@pytest.mark.parametrize("model", MODELS)
def test_every_field_has_a_bound(model: type[Request]) -> None:
    schema = model.model_json_schema()
    found = [problem for name, part in schema.get("$defs", {}).items() for problem in unbounded(part, name)]
    found += unbounded({key: value for key, value in schema.items() if key != "$defs"}, model.__name__)
    assert not found


def test_the_walk_finds_what_has_no_bound() -> None:
    class Careless(Request):
        text: str
        number: int
        items: list[int]
        members: dict[str, int]

    assert len(list(unbounded(Careless.model_json_schema(), "Careless"))) == 5


@pytest.mark.parametrize("model", MODELS)
def test_null_is_the_default_of_every_optional_field(model: type[Request]) -> None:
    optional = {name: None for name, field in model.model_fields.items() if not field.is_required()}
    assert model.model_validate(optional | MINIMAL[model]) == model.model_validate(MINIMAL[model])


@pytest.mark.parametrize("model", GENERATION)
@pytest.mark.parametrize(
    ("field", "lowest", "highest", "step"),
    [
        ("temperature", 0, 2, 0.001),
        ("top_p", 0, 1, 0.001),
        ("min_p", 0, 1, 0.001),
        ("presence_penalty", -2, 2, 0.001),
        ("frequency_penalty", -2, 2, 0.001),
        ("n", 1, 128, 1),
        ("seed", -(2**63), 2**63 - 1, 1),
        ("top_k", -1, 2**31 - 1, 1),
        ("min_tokens", 0, 2**31 - 1, 1),
        ("max_tokens", 0, 2**31 - 1, 1),
        ("max_completion_tokens", 0, 2**31 - 1, 1),
        ("max_new_tokens", 0, 2**31 - 1, 1),
    ],
)
def test_ranges_include_their_ends(
    model: type[Request], field: str, lowest: float, highest: float, step: float
) -> None:
    if model is ChatCompletionRequest and field.startswith("max_"):
        lowest = 1  # a completion of no tokens scores its prompt; a chat has nothing to say then
    for value in (lowest, highest):
        assert getattr(model.model_validate({**MINIMAL[model], field: value}), field) == value
    for value in (lowest - step, highest + step):
        with pytest.raises(ValidationError):
            model.model_validate({**MINIMAL[model], field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("n", "1"),
        ("n", True),
        ("n", 1.5),
        ("seed", "7"),
        ("stream", 1),
        ("stream", "true"),
        ("stop", [1]),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 1025]),
        ("bad_words", ["x"] * 129),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(129))),
        ("allowed_token_ids", []),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": -101}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("typical_p", 0),
        ("repetition_penalty", 0),
        ("repetition_penalty", 0.001),
        ("repetition_penalty", 101),
        ("metadata", {"k": 1}),
        ("metadata", {"k" * 65: "v"}),
        ("metadata", {"k": "v" * 513}),
        ("metadata", {str(i): "v" for i in range(17)}),
        ("model", ""),
        ("service_tier", "golden"),
    ],
)
@pytest.mark.parametrize("model", GENERATION)
def test_refuses(model: type[Request], field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as raised:
        model.model_validate({**MINIMAL[model], field: value})
    assert {problem["loc"][0] for problem in raised.value.errors()} == {field}


@pytest.mark.parametrize("model", GENERATION)
def test_whole_numbers_may_be_spelt_with_a_fraction(model: type[Request]) -> None:
    request = model.model_validate({**MINIMAL[model], "n": 2.0, "temperature": 1, "max_tokens": 16.0})
    assert request.n == 2  # type: ignore[attr-defined]
    assert isinstance(request.n, int)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "content",
    ["text", [], [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]],
)
@pytest.mark.parametrize("role", ["developer", "system", "user", "assistant"])
def test_content_is_text_or_parts(role: str, content: Any) -> None:
    ChatCompletionRequest.model_validate({"messages": [{"role": role, "content": content}]})


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
        {"role": "function", "content": "42", "name": "f"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}],
        },
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "audio": None, "tool_calls": None},
        {"role": "user", "content": "a", "name": "Ada"},
    ],
)
def test_messages(message: dict[str, Any]) -> None:
    ChatCompletionRequest.model_validate({"messages": [message]})


@pytest.mark.parametrize(
    ("field", "neutral", "asking"),
    [
        ("tools", [[], None], [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", ["none", "auto"], "required"),
        ("functions", [[]], [{"name": "f"}]),
        ("function_call", ["none", "auto"], {"name": "f"}),
        ("response_format", [{"type": "text"}], {"type": "json_object"}),
        ("modalities", [["text"], []], ["text", "audio"]),
        ("audio", [None], {"voice": "x", "format": "mp3"}),
        ("web_search_options", [None], {"search_context_size": "low"}),
        ("web_search_options", [None], {}),
        ("moderation", [None, {}], {"model": "m"}),
    ],
)
def test_what_is_not_supported_may_only_ask_for_nothing(field: str, neutral: list[Any], asking: Any) -> None:
    for value in neutral:
        request = ChatCompletionRequest.model_validate({**MINIMAL[ChatCompletionRequest], field: value})
        assert getattr(request, field) is None
    with pytest.raises(ValidationError, match="is not supported"):
        ChatCompletionRequest.model_validate({**MINIMAL[ChatCompletionRequest], field: asking})


def test_template_variables_are_bounded() -> None:
    def nested(depth: int) -> Any:
        return {"a": nested(depth - 1)} if depth else 1

    ok = {"enable_thinking": False, "nested": nested(10)}
    for kwargs in ({"a": nested(17)}, {"a": list(range(5000))}, {str(i): 1 for i in range(65)}, {"a": [float("inf")]}):
        ChatCompletionRequest.model_validate({**MINIMAL[ChatCompletionRequest], "chat_template_kwargs": ok})
        with pytest.raises(ValidationError):
            ChatCompletionRequest.model_validate({**MINIMAL[ChatCompletionRequest], "chat_template_kwargs": kwargs})


@pytest.mark.parametrize("prompt", ["", "text", ["a", "b"], [""], [1, 2], [[1], [2, 3]], [[]], None])
def test_prompts(prompt: Any) -> None:
    assert CompletionRequest.model_validate({"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize(
    "prompt", [[], 1, {}, [1, "a"], ["a", 1], [[1], "a"], [[1], ["a"]], [-1], [True], [1.5], ["a"] * 2049]
)
def test_refused_prompts(prompt: Any) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"prompt": prompt})


def test_a_million_choices_allocate_nothing() -> None:
    for field, value in {"n": 10**6, "top_logprobs": 10**6, "max_tokens": 2**63, "seed": 2**63}.items():
        with pytest.raises(ValidationError):
            ChatCompletionRequest.model_validate({**MINIMAL[ChatCompletionRequest], field: value})
