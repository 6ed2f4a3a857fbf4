"""What is reused changes the time and `cached_tokens`, never the answer."""

from __future__ import annotations

import random

from support.live_api import CHAT, Answer, LiveApi, assert_same

BLOCK_SIZE = 16


def fresh_prompt(seed: int, num_tokens: int = 70) -> list[int]:
    """Ids that no other test has sent."""
    rng = random.Random(f"cache {seed}")
    return [rng.randrange(5, 400) for _ in range(num_tokens)]


def cached_tokens(answer: Answer) -> int:
    assert answer.usage is not None
    number: int = answer.usage["prompt_tokens_details"]["cached_tokens"]
    return number


def test_the_second_time_the_prompt_is_cached(api: LiveApi) -> None:
    prompt = fresh_prompt(1)
    first, second = (api.complete(prompt, seed=1, logprobs=2) for _ in range(2))
    assert cached_tokens(first) == 0
    assert cached_tokens(second) == len(prompt) // BLOCK_SIZE * BLOCK_SIZE
    assert_same(second.choices, first.choices)
    streamed = api.complete(prompt, seed=1, logprobs=2, stream=True, stream_options={"include_usage": True})
    assert cached_tokens(streamed) == cached_tokens(second)
    assert_same(streamed.choices, first.choices)


def test_a_common_beginning_is_cached(api: LiveApi) -> None:
    prompt = fresh_prompt(2)
    api.complete(prompt)
    longer = api.complete(prompt[:40] + fresh_prompt(3), seed=2)
    assert cached_tokens(longer) == 32
    uncached = api.complete(prompt[:40] + fresh_prompt(3), seed=2, use_cache=False)
    assert_same(longer.choices, uncached.choices)


def test_a_chat_that_goes_on_is_cached(api: LiveApi) -> None:
    question = {"role": "user", "content": "A question that is asked here only: " + "why? " * 10}
    body = {"messages": [question], "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    first = api.answer(CHAT, body)
    turns = [question, {"role": "assistant", "content": "Because."}, {"role": "user", "content": "I see."}]
    second = api.answer(CHAT, body | {"messages": turns})
    assert cached_tokens(first) == 0
    assert cached_tokens(second) > 0


def test_without_the_cache_the_answer_is_the_same(api: LiveApi) -> None:
    for seed in range(3):
        prompt = fresh_prompt(10 + seed, 30)
        parameters = {"seed": seed, "max_tokens": 24, "logprobs": 2, "n": 2, "ignore_eos": True}
        uncached = api.complete(prompt, use_cache=False, **parameters)
        assert cached_tokens(uncached) == 0
        assert_same(api.complete(prompt, **parameters).choices, uncached.choices)
        # Now the prompt is in the cache, and still nothing of it is used.
        assert cached_tokens(api.complete(prompt, use_cache=False, **parameters)) == 0


def test_metrics_count_what_was_reused(api: LiveApi) -> None:
    prompt = fresh_prompt(20)
    api.complete(prompt, max_tokens=1)
    api.wait_idle()
    before = api.metrics()
    api.complete(prompt, max_tokens=1)
    api.wait_idle()
    after = api.metrics()
    assert after["cached_prompt_tokens_total"] - before["cached_prompt_tokens_total"] == 64
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == len(prompt)
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 1
