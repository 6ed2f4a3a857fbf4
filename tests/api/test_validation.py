from __future__ import annotations

import json
from typing import Any

import pytest

from reprise.api.validation import parse
from reprise.errors import InvalidRequestError
from reprise.protocol.requests import ChatCompletionRequest, CompletionRequest, TokenizeRequest

HELLO = {"role": "user", "content": "Hello"}
CANARY = "canary-Xq7"


def refused(model: Any, body: Any) -> InvalidRequestError:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(InvalidRequestError) as raised:
        parse(model, data)
    return raised.value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"prompt":' * 100_000,
        b'{"prompt": "a"} {}',
        b'{"prompt": "a",}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda body: body[:16].decode(errors="replace"),
)
def test_what_is_no_json(body: bytes) -> None:
    error = refused(CompletionRequest, body)
    assert (error.code, error.param) == ("invalid_json", None)
    assert len(error.message) < 200


@pytest.mark.parametrize("body", [[], "text", 1, None, True])
def test_what_is_no_object(body: Any) -> None:
    error = refused(CompletionRequest, body)
    assert (error.code, error.param) == ("invalid_type", None)


def test_of_duplicate_members_the_last_counts() -> None:
    assert parse(CompletionRequest, b'{"prompt": "a", "prompt": "b"}').prompt == "b"


@pytest.mark.parametrize(
    ("body", "param", "code", "message"),
    [
        ({}, "messages", "missing_required_parameter", "Missing required parameter: 'messages'."),
        ({"messages": []}, "messages", "invalid_value", "Invalid 'messages': must have at least 1 item."),
        (
            {"messages": [HELLO, {"role": "user"}]},
            "messages[1].content",
            "missing_required_parameter",
            "Missing required parameter: 'messages[1].content'.",
        ),
        (
            {"messages": [{"content": "a"}]},
            "messages[0].role",
            "missing_required_parameter",
            "Missing required parameter: 'messages[0].role'.",
        ),
        (
            {"messages": [{"role": "robot", "content": "a"}]},
            "messages[0].role",
            "invalid_value",
            (
                "Invalid 'messages[0].role': must be one of "
                "'developer', 'system', 'user', 'assistant', 'tool', 'function'."
            ),
        ),
        (
            {"messages": [{"role": "user", "content": 4}]},
            "messages[0].content",
            "invalid_type",
            "Invalid type for 'messages[0].content': expected a string or an array of content parts, got 4.",
        ),
        ({"messages": ["a"]}, "messages[0]", "invalid_type", None),
        (
            {"messages": HELLO},
            "messages",
            "invalid_type",
            "Invalid type for 'messages': expected an array, got an object.",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}
                ]
            },
            "messages[0].content[1]",
            "unsupported_content",
            (
                "'messages[0].content[1]': a content part of type 'image_url' is not supported: "
                "this server takes text only."
            ),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "missing_required_parameter",
            None,
        ),
        (
            {"messages": [HELLO], "temperature": 3},
            "temperature",
            "invalid_value",
            "Invalid 'temperature': 3 must be at most 2.0.",
        ),
        (
            {"messages": [HELLO], "temperature": "1"},
            "temperature",
            "invalid_type",
            "Invalid type for 'temperature': expected a number, got a string.",
        ),
        ({"messages": [HELLO], "n": True}, "n", "invalid_type", "Invalid type for 'n': expected an integer, got true."),
        (
            {"messages": [HELLO], "temprature": 1},
            "temprature",
            "unknown_parameter",
            "Unknown parameter: 'temprature'. Did you mean 'temperature'?",
        ),
        ({"messages": [HELLO], "x" * 500: 1}, "x" * 64 + "…", "unknown_parameter", None),
        (
            {"messages": [HELLO], "stream_options": {"include_usages": True}},
            "stream_options.include_usages",
            "unknown_parameter",
            "Unknown parameter: 'stream_options.include_usages'. Did you mean 'include_usage'?",
        ),
        (
            {"messages": [HELLO], "tools": [{}]},
            "tools",
            "unsupported_parameter",
            "'tools' is not supported by this server.",
        ),
        ({"messages": [HELLO], "stop": ["a", 1]}, "stop[1]", "invalid_type", None),
        (
            {"messages": [HELLO], "stop": 5},
            "stop",
            "invalid_type",
            "Invalid type for 'stop': expected a string or an array of strings, got 5.",
        ),
        *[
            (
                {"messages": [HELLO], "max_tokens": number},
                "max_tokens",
                "invalid_value",
                f"Invalid 'max_tokens': {number} must be at least 1.",
            )
            for number in (0, -5)
        ],
        ({"messages": [HELLO], "logit_bias": {"a": 1}}, "logit_bias.a", "invalid_value", None),
        (
            {"messages": [HELLO], "verbosity": "loud"},
            "verbosity",
            "invalid_value",
            "Invalid 'verbosity': must be 'low', 'medium' or 'high'.",
        ),
    ],
)
def test_errors_name_the_field_and_what_would_be_right(body: Any, param: str, code: str, message: str | None) -> None:
    error = refused(ChatCompletionRequest, body)
    assert (error.param, error.code) == (param, code)
    if message is not None:
        assert error.message == message


def test_a_role_that_is_also_a_field() -> None:
    """`user` is a role, so pydantic's name for the union's member, and here also an unknown field."""
    error = refused(ChatCompletionRequest, {"messages": [{"role": "user", "content": 4, "user": {"content": 1}}]})
    assert error.param == "messages[0].content"
    assert "messages[0].user" in error.message


def test_further_problems_are_named() -> None:
    error = refused(ChatCompletionRequest, {"messages": [HELLO], "n": 0, "top_p": 2, "foo": 1})
    assert error.param == "n"
    assert error.message.endswith("Wrong as well: top_p, foo.") or "top_p" in error.message


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": CANARY, "content": CANARY}]},
        {"messages": [HELLO], "temperature": CANARY},
        {"messages": [HELLO], "verbosity": CANARY},
        {"messages": [HELLO], "stop": [CANARY, 1]},
        {"messages": CANARY},
        {"messages": [{"role": "user", "content": {"text": CANARY}}]},
        {"messages": [HELLO], "logit_bias": CANARY},
    ],
)
def test_no_string_of_the_body_is_repeated(body: Any) -> None:
    error = refused(ChatCompletionRequest, body)
    assert CANARY not in error.message
    assert error.__cause__ is None


@pytest.mark.parametrize(
    ("prompt", "param"),
    [([1, "a"], "prompt[1]"), (["a", 1], "prompt[1]"), ([[1], ["a"]], "prompt[1][0]"), ({}, "prompt"), ([], "prompt")],
)
def test_prompts(prompt: Any, param: str) -> None:
    assert refused(CompletionRequest, {"prompt": prompt}).param == param


def test_unknown_fields_of_other_requests() -> None:
    assert "Did you mean 'prompt'?" in refused(TokenizeRequest, {"promt": "a"}).message


def test_a_schema_is_made_once_for_the_names_that_a_suggestion_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients send members of messages that are not known here, each time that they are refused."""
    body = {"messages": [{"role": "user", "content": "a", "reasoning_contents": "x"}]}
    first = refused(ChatCompletionRequest, body).message
    monkeypatch.setattr(ChatCompletionRequest, "model_json_schema", pytest.fail)
    assert refused(ChatCompletionRequest, body).message == first


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["temperature", "seed", "prompt", "logit_bias", "chat_template_kwargs.x", "stop"])
def test_what_is_no_number_names_its_field(name: str, number: str) -> None:
    member, _, below = name.partition(".")
    value = f'{{"{below}": {number}}}' if below else number
    error = refused(TokenizeRequest if below else CompletionRequest, f'{{"{member}": {value}}}'.encode())
    assert (error.param, error.code) in ((member, "invalid_value"), (member, "invalid_type"))


def test_of_many_unknown_members_few_are_looked_at() -> None:
    names = {f"x{number}": 1 for number in range(1000)}
    for body, param in (
        ({"messages": [HELLO], **names}, "x0"),
        ({"messages": [HELLO | names]}, "messages[0].x0"),
    ):
        error = refused(ChatCompletionRequest, body)
        assert (error.param, error.code) == (param, "unknown_parameter")
        assert "x5" in error.message
        assert "x6" not in error.message


def test_ids_in_pieces_are_found_where_they_are() -> None:
    ids: list[Any] = [5] * 10_000
    assert parse(CompletionRequest, json.dumps({"prompt": ids}).encode()).prompt == ids
    for wrong in ("a", -1, 2**31, True, 1.5, None, [5]):
        ids[9000] = wrong
        error = refused(CompletionRequest, {"prompt": ids})
        assert error.param == "prompt[9000]", wrong
        assert refused(CompletionRequest, {"prompt": [[1], ids]}).param == "prompt[1][9000]"
