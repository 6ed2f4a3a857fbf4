"""A stream is the answer in pieces, under every setting and however many streams there are."""

from __future__ import annotations

import random
from typing import Any

import pytest

from support.live_api import CHAT, COMPLETIONS, Answer, Call, LiveApi, assert_same
from support.loopback import events
from support.tiny_tokenizers import SPECIAL_TOKENS

PROMPT = "The quick brown fox"
NUM_TOKENS = 32
SEEDS = range(6)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"temperature": 0},
    {"logprobs": 3},
    {"logprobs": 0, "n": 2},
    {"echo": True},
    {"echo": True, "logprobs": 2, "n": 2},
    {"echo": True, "stop": ["a", "e"]},
    {"stop": ["er", "in", "\ufffd\ufffd"]},
    {"stop": [" ", "T"], "include_stop_str_in_output": True, "logprobs": 1},
    {"stop_token_ids": [60, 61, 62, 63, 64, 65, 66, 67], "include_stop_str_in_output": True},
    {"bad_words": ["Smiley", "e", "好"]},
    {"skip_special_tokens": False},
    {"min_tokens": 20, "stop": ["e"]},
    {"use_cache": False, "max_tokens": 12},
    {"prompt": [PROMPT, "def main():", ""], "n": 2},
]


def call(path: str, seed: int, **parameters: Any) -> Call:
    body: dict[str, Any] = {"max_tokens": NUM_TOKENS, "seed": seed, "return_token_ids": True}
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": PROMPT}]
    else:
        body["prompt"] = PROMPT
    return path, body | parameters


def streamed(calls: list[Call]) -> list[Call]:
    return [(path, body | {"stream": True, "stream_options": {"include_usage": True}}) for path, body in calls]


def assert_equal_to_streams(api: LiveApi, calls: list[Call]) -> list[Answer]:
    """Ask for all, whole and streamed, at once. Returns the whole answers."""
    answers = api.together(calls + streamed(calls))
    whole, streams = answers[: len(calls)], answers[len(calls) :]
    for one, stream in zip(whole, streams, strict=True):
        assert_same(stream.choices, one.choices)
        assert stream.usage is not None
        assert one.usage is not None
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert stream.usage[name] == one.usage[name]
        assert one.usage["completion_tokens"] == sum(len(choice.token_ids) for choice in one.choices)
    return whole


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "+".join(setting) or "plain")
def test_completions(api: LiveApi, setting: dict[str, Any]) -> None:
    assert_equal_to_streams(api, [call(COMPLETIONS, seed, **setting) for seed in SEEDS])


def test_chat(api: LiveApi) -> None:
    unfit = ("echo", "logprobs", "prompt")
    settings = [setting for setting in SETTINGS if not any(name in setting for name in unfit)]
    settings += [{"logprobs": True, "top_logprobs": 4}, {"logprobs": True, "n": 2, "stop": ["e"]}]
    assert_equal_to_streams(api, [call(CHAT, seed, **setting) for setting in settings for seed in SEEDS[:2]])


def test_usage_is_told_only_where_it_was_asked_for(api: LiveApi) -> None:
    path, body = call(COMPLETIONS, 1, stream=True)
    without = events(api.post(path, body).text)
    assert not any("usage" in chunk for chunk in without[:-1])
    with_usage = events(api.post(path, body | {"stream_options": {"include_usage": True}}).text)
    assert all(chunk["usage"] is None for chunk in with_usage[:-2])
    assert with_usage[-2]["choices"] == []


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_at_any_place_cuts_there(api: LiveApi, include: bool) -> None:
    """Stop strings are cut out of unstopped answers: across tokens, within them, with broken characters."""
    rng = random.Random(int(include))
    free = api.together([call(COMPLETIONS, seed, ignore_eos=True) for seed in SEEDS])
    calls, expected = [], []
    for seed, answer in zip(SEEDS, free, strict=True):
        for _ in range(4):
            start = rng.randrange(len(answer.text) - 1)
            stop = answer.text[start : start + rng.randint(1, 8)]
            end = answer.text.index(stop)
            calls.append(
                call(COMPLETIONS, seed, ignore_eos=True, stop=[stop, "never#"], include_stop_str_in_output=include)
            )
            expected.append((answer.text[:end] + (stop if include else ""), "stop", stop))
    found = assert_equal_to_streams(api, calls)
    told = [(answer.text, answer.choices[0].finish_reason, answer.choices[0].stop_reason) for answer in found]
    assert told == expected


def test_no_piece_of_a_stop_string_leaks(api: LiveApi) -> None:
    """What a client has seen at any moment is a beginning of the final text."""
    # So long that no reader is late for most of it: what it is late for comes as one piece.
    settings = {"max_tokens": 5 * NUM_TOKENS, "ignore_eos": True}
    free = api.complete(PROMPT, seed=1, **settings).text
    stop = free[len(free) // 2 : len(free) // 2 + 6]
    path, body = call(COMPLETIONS, 1, stop=stop, stream=True, **settings)
    pieces = [part["text"] for chunk in events(api.post(path, body).text)[:-1] for part in chunk["choices"]]
    assert "".join(pieces) == free[: free.index(stop)]
    assert len(pieces) > 4


def test_bad_words_never_appear(api: LiveApi) -> None:
    """The words are those that the answers had without them: whole, across tokens, and single characters."""
    rng = random.Random(3)
    calls, banned = [], []
    for seed, answer in zip(SEEDS, api.together([call(COMPLETIONS, seed) for seed in SEEDS]), strict=True):
        text = answer.text.replace("\ufffd", " ")
        for size in (1, 2, 3, 5):
            start = rng.randrange(max(1, len(text) - size))
            words = [
                word for word in {text[start : start + size], text[start // 2 : start // 2 + size]} if word.strip()
            ]
            calls.append(call(COMPLETIONS, seed, bad_words=words, max_tokens=64, ignore_eos=True))
            banned.append(words)
    for words, answer in zip(banned, assert_equal_to_streams(api, calls), strict=True):
        for word in words:
            assert word.lstrip(" ") not in answer.text
            assert word not in answer.text


def test_bad_words_change_an_answer_that_had_them(api: LiveApi) -> None:
    free = api.complete(PROMPT, temperature=0, max_tokens=NUM_TOKENS)
    word = next(part for part in free.text.replace("\ufffd", " ").split() if part)
    assert word not in api.complete(PROMPT, temperature=0, max_tokens=NUM_TOKENS, bad_words=[word]).text


def test_bytes_of_chat_logprobs_join_to_the_text(api: LiveApi) -> None:
    calls = [call(CHAT, seed, logprobs=True, top_logprobs=2, max_tokens=64, ignore_eos=True) for seed in SEEDS]
    split = 0
    for answer in assert_equal_to_streams(api, calls):
        entries = answer.choices[0].logprobs
        assert entries is not None
        data = [bytes(entry["bytes"]) for entry in entries]
        assert b"".join(data).decode(errors="replace") == answer.text
        for entry in entries:
            assert bytes(entry["bytes"]).decode(errors="replace") in (entry["token"], "")
            assert all(bytes(top["bytes"]).decode(errors="replace") == top["token"] for top in entry["top_logprobs"])
        split += sum(not _is_text(part) for part in data)
    assert split, "no token was a part of a character, so nothing was shown"


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_text_offsets_of_legacy_logprobs(api: LiveApi) -> None:
    calls = [call(COMPLETIONS, seed, logprobs=1, echo=True, ignore_eos=True) for seed in SEEDS]
    for answer in assert_equal_to_streams(api, calls):
        entries = answer.choices[0].logprobs
        assert entries is not None
        offsets = [offset for *_, offset in entries]
        assert offsets == sorted(offsets)
        for token, _, _, offset in entries:
            if not token.startswith("bytes:") and token not in SPECIAL_TOKENS:
                assert answer.text.startswith(token, offset)


def test_whole_characters_only(api: LiveApi) -> None:
    """Characters that several tokens spell come whole: the ids of a text with many, forced one by one."""
    text = "👩🏽‍🚀你好é🇩🇪"
    token_ids = api.tokenize(text, add_special_tokens=False)
    assert len(token_ids) > len(text)
    scored = {"prompt": token_ids, "echo": True, "max_tokens": 0}
    assert api.answer(COMPLETIONS, scored).text == text
    assert api.answer(COMPLETIONS, scored | {"stream": True}).text == text


def test_many_streams_at_once(api: LiveApi) -> None:
    """More than half of the server's places, each stream with its own text."""
    calls = [call(COMPLETIONS, seed, max_tokens=40 + seed, ignore_eos=True) for seed in range(32)]
    alone = [api.answer(*one).choices for one in calls]
    together = api.together(streamed(calls))
    for one, other in zip(alone, together, strict=True):
        assert_same(other.choices, one)
    assert len({answer.text for answer in together}) == 32
    api.wait_idle()


def test_more_sequences_than_places(api: LiveApi) -> None:
    """Twice 64: half of them wait for their turn and all get their own answer."""
    calls = [call(COMPLETIONS, seed, n=32, max_tokens=10) for seed in range(4)]
    alone = [api.answer(*one).choices for one in calls]
    for one, other in zip(alone, api.together(calls), strict=True):
        assert_same(other.choices, one)
