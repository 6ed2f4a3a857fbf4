"""Whatever comes over the socket is answered by a 4xx in OpenAI's shape that names the parameter, and served on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from support.live_api import CHAT, COMPLETIONS, LiveApi
from support.live_servers import CONTEXT
from support.loopback import events

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
PROMPT = {"prompt": "Hello"}
VOCAB_SIZE = 420


@pytest.fixture(autouse=True)
def _served_on(api: LiveApi) -> Iterator[None]:
    """After each of these requests the next one is answered as always, and nothing is left behind."""
    yield
    assert len(api.complete(max_tokens=2, ignore_eos=True).token_ids) == 2
    api.wait_idle()


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert isinstance(error["code"], str)
    assert not error["code"].isdigit()
    return error


def raw(api: LiveApi, path: str, body: bytes, **headers: str) -> Any:
    return api.client.post(path, content=body, headers={"content-type": "application/json"} | headers)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"prompt": "a"', b"hello", b"[" * 50_000, b'{"prompt": "\xff\xfe"}', b"{'prompt': 'a'}", b"\x00"],
    ids=["empty", "open", "cut", "text", "deep", "not-utf8", "quotes", "nul"],
)
def test_malformed_json(api: LiveApi, path: str, body: bytes) -> None:
    assert error_of(raw(api, path, body), 400)["code"] == "invalid_json"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "presence_penalty", "min_p", "seed", "max_tokens"])
def test_numbers_that_are_none(api: LiveApi, name: str, number: str) -> None:
    body = f'{{"prompt": "a", "{name}": {number}}}'.encode()
    assert error_of(raw(api, COMPLETIONS, body), 400)["param"] == name


@pytest.mark.parametrize(
    ("prediction", "param"),
    [
        ("text", "prediction"),
        ({"content": "a"}, "prediction.type"),
        ({"type": "tokens", "content": "a"}, "prediction.type"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "content", "content": 5}, "prediction.content"),
        ({"type": "content", "content": "word " * (2 * CONTEXT)}, "prediction.content"),
    ],
)
def test_predictions_that_are_none(api: LiveApi, prediction: Any, param: str) -> None:
    error = error_of(api.client.post(CHAT, json={**HELLO, "prediction": prediction}), 400)
    assert error["param"] == param


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"1", b"null", b"true"])
def test_json_that_is_no_object(api: LiveApi, body: bytes) -> None:
    assert error_of(raw(api, CHAT, body), 400)["code"] == "invalid_type"


OUT_OF_RANGE: list[tuple[str, list[Any]]] = [
    ("temperature", [-0.1, 2.1, 1e300]),
    ("top_p", [-0.1, 1.1]),
    ("top_k", [-2, 2**31, 1.5]),
    ("min_p", [-0.1, 1.1]),
    ("typical_p", [0, -1, 1.1]),
    ("repetition_penalty", [0, -1, 101]),
    ("presence_penalty", [-2.1, 2.1]),
    ("frequency_penalty", [-2.1, 2.1]),
    ("seed", [2**63, -(2**63) - 1, 0.5, 10**40]),
    ("n", [0, -1, 129, 1.5]),
    ("max_tokens", [-1, 2**31, 1.5]),
    ("max_completion_tokens", [-1, 2**31]),
    ("max_new_tokens", [-1, 2**31]),
    ("min_tokens", [-1, 2**31, 17]),
]
WRONG_TYPES: list[tuple[str, list[Any]]] = [
    *[(name, ["1", True, [], {}, [1]]) for name, _ in OUT_OF_RANGE],
    *[
        (name, ["true", 1, 0, [], {}])
        for name in (
            "stream", "do_sample", "use_cache", "ignore_eos", "include_stop_str_in_output", "add_special_tokens",
            "skip_special_tokens", "return_token_ids",
        )
    ],
    ("stop", [1, {}, [1], ["a", None], [["a"]], "", [""]]),
    ("bad_words", [1, {}, [1], [""], ""]),
    ("stop_token_ids", [1, "a", ["a"], [1.5], [True], [-1]]),
    ("allowed_token_ids", [1, "a", ["a"], [], [-1]]),
    ("logit_bias", [1, [], "a", {"a": 1}, {"1": "x"}, {"1": 101}, {"1": -101}, {"-1": 1}, {"1.5": 1}]),
    ("model", [1, [], {}]),
    ("stream_options", [1, [], "a"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values"), OUT_OF_RANGE + WRONG_TYPES, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize(("path", "base"), [(CHAT, HELLO), (COMPLETIONS, PROMPT)], ids=["chat", "completions"])
def test_wrong_values(api: LiveApi, path: str, base: dict[str, Any], name: str, values: list[Any]) -> None:
    for value in values:
        if name == "min_tokens" and value == 17 and path == CHAT:
            continue  # the default limit of chat is the context
        body = {**base, "max_tokens": 16, name: value} if name == "min_tokens" else {**base, name: value}
        error = error_of(api.post(path, body), 400)
        assert error["param"].startswith(name), (value, error)
        assert name in error["message"], (value, error)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "Hello"}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        (CHAT, {**HELLO, "max_tokens": 0}, "max_tokens"),
        (CHAT, {**HELLO, "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {**HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {**HELLO, "logprobs": 3}, "logprobs"),
        (CHAT, {**HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (CHAT, {**HELLO, "response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {**HELLO, "echo": True}, "echo"),
        (CHAT, {**HELLO, "temprature": 1}, "temprature"),
        (COMPLETIONS, {**PROMPT, "logprobs": True}, "logprobs"),
        (COMPLETIONS, {**PROMPT, "logprobs": 21}, "logprobs"),
        (COMPLETIONS, {**PROMPT, "best_of": 3}, "best_of"),
        (COMPLETIONS, {**PROMPT, "suffix": "x"}, "suffix"),
        (COMPLETIONS, {**PROMPT, "messages": []}, "messages"),
        (COMPLETIONS, {"prompt": 1}, "prompt"),
        (COMPLETIONS, {"prompt": {}}, "prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [1.5]}, "prompt[0]"),
        (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 65}, "prompt"),
        (COMPLETIONS, {**PROMPT, "stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {**PROMPT, "do_sample": False, "temperature": 1}, "do_sample"),
        (COMPLETIONS, {**PROMPT, "max_tokens": 4, "max_new_tokens": 5}, "max_new_tokens"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit(api: LiveApi, path: str, body: dict[str, Any], param: str) -> None:
    assert error_of(api.post(path, body), 400)["param"] == param


@pytest.mark.parametrize("token_id", [VOCAB_SIZE, 10**6, 2**31 - 1])
def test_ids_outside_the_vocabulary(api: LiveApi, token_id: int) -> None:
    for path, body, param in (
        (COMPLETIONS, {"prompt": [5, token_id]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [[5], [5, token_id]]}, "prompt[1][1]"),
        (COMPLETIONS, {**PROMPT, "stop_token_ids": [token_id]}, "stop_token_ids[0]"),
        (COMPLETIONS, {**PROMPT, "allowed_token_ids": [5, token_id]}, "allowed_token_ids[1]"),
        (CHAT, {**HELLO, "logit_bias": {str(token_id): 1}}, "logit_bias"),
        ("/detokenize", {"tokens": [5, token_id]}, "tokens[1]"),
    ):
        error = error_of(api.post(path, body), 400)
        assert error["param"].startswith(param)
        assert error["code"] == "token_id_out_of_range"
    assert error_of(api.post(COMPLETIONS, {"prompt": [5, -1]}), 400)["param"] == "prompt[1]"


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_that_are_too_long(api: LiveApi, stream: bool) -> None:
    chat = {"messages": [{"role": "user", "content": "你" * 3 * CONTEXT}]}
    for path, body, param in (
        (COMPLETIONS, {"prompt": [5] * CONTEXT}, "prompt"),
        (COMPLETIONS, {"prompt": "你" * 3 * CONTEXT}, "prompt"),
        (CHAT, chat, "messages"),
    ):
        error = error_of(api.post(path, body | {"stream": stream}), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert str(CONTEXT) in error["message"]
    fits = api.complete([5] * (CONTEXT - 2), max_tokens=50, ignore_eos=True)
    assert (len(fits.token_ids), fits.choices[0].finish_reason) == (2, "length")


def test_an_unknown_model(api: LiveApi) -> None:
    for path, body in ((CHAT, HELLO), (COMPLETIONS, PROMPT)):
        error = error_of(api.post(path, body | {"model": "gpt-17"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "gpt-17" in error["message"]
        assert "tiny" in error["message"]
    assert error_of(api.get("/v1/models/gpt-17"), 404)["code"] == "model_not_found"


def test_a_mask_that_leaves_nothing(api: LiveApi) -> None:
    """Refused at once where it can be known, else found out in the engine: the client's error, whole and streamed."""
    spelt = api.post("/detokenize", {"tokens": [40]}).json()["prompt"]
    end = {"allowed_token_ids": [2], "min_tokens": 3, "max_tokens": 5}
    for masks in (end, {"allowed_token_ids": [40], "bad_words": [spelt]}):
        for stream in (False, True):
            error = error_of(api.post(COMPLETIONS, {**PROMPT, **masks, "stream": stream}), 400)
            assert (error["code"], error["param"]) == ("no_admissible_token", "allowed_token_ids")
    later = {**PROMPT, "allowed_token_ids": [40], "bad_words": [spelt * 2]}
    error = error_of(api.post(COMPLETIONS, later), 400)
    assert (error["code"], error["param"]) == ("no_admissible_token", "allowed_token_ids")
    *_, told, done = events(api.post(COMPLETIONS, later | {"stream": True}).text)
    assert (told["error"], done) == (error, "[DONE]")


def test_urls_and_methods(api: LiveApi) -> None:
    assert error_of(api.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(api.get(CHAT), 405)["code"] == "method_not_allowed"
    assert error_of(api.client.delete("/v1/models"), 405)["code"] == "method_not_allowed"
    form = api.client.post(CHAT, data={"prompt": "a"})
    assert error_of(form, 415)["code"] == "unsupported_media_type"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_10_megabytes(api: LiveApi, chunked: bool) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(160):
            yield b"a" * 65536
        yield b'"}'

    content = pieces() if chunked else b"".join(pieces())
    response = api.client.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    assert error_of(response, 413)["code"] == "request_too_large"


def exchange(api: LiveApi, data: bytes) -> bytes:
    """What comes back for these bytes until the server closes."""
    with socket.create_connection(("127.0.0.1", api.client.base_url.port or 0), timeout=20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: abc\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
    ids=["words", "version", "negative", "letters", "chunk", "long-url", "long-header"],
)
def test_what_is_no_http(api: LiveApi, data: bytes) -> None:
    try:
        answer = exchange(api, data)
    except (ConnectionResetError, BrokenPipeError):
        return  # refused while it was still being sent
    status, _, rest = answer.partition(b"\r\n")
    assert status.startswith(b"HTTP/1.1 4")
    assert json.loads(rest.partition(b"\r\n\r\n")[2])["error"]["message"]
