"""The whole API over models that run in other ways: the padded tier, and half the bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from benchmarks.local_server import start_server
from support.live_api import COMPLETIONS, LiveApi, assert_same
from support.live_servers import CONTEXT, save_long_context

MODELS = {
    "falcon": ("--dtype", "bfloat16"),
    "llama": ("--dtype", "bfloat16", "--tier", "paged"),
    "mamba": ("--dtype", "float32"),
}
TIERS = {"falcon": "padded", "llama": "paged", "mamba": "padded"}

pytestmark = pytest.mark.xdist_group("tiers")


@pytest.fixture(scope="module")
def apis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LiveApi]]:
    """A server of each model; they load at the same time."""
    with ExitStack() as stack:
        servers = {}
        for name, flags in MODELS.items():
            directory = save_long_context(tmp_path_factory.mktemp(name), name)
            common = ("--served-model-name", name, "--num-threads", "1", "--kv-cache-memory", "4MiB")
            servers[name] = start_server(str(directory), *flags, *common, directory=tmp_path_factory.mktemp("log"))
            stack.callback(servers[name].stop)
        for server in servers.values():
            server.wait_until_ready()
        yield {name: stack.enter_context(LiveApi(server)) for name, server in servers.items()}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def api(apis: dict[str, LiveApi], name: str) -> LiveApi:
    return apis[name]


def test_models_tell_how_they_run(api: LiveApi, name: str) -> None:
    response = api.get(f"/v1/models/{name}")
    assert response.status_code == 200, response.text
    model = response.json()
    dtype = MODELS[name][1]
    assert (model["tier"], model["dtype"]) == (TIERS[name], dtype)
    assert model["tier_reason"]
    assert model["architecture"].lower().startswith(name)


def test_chat_and_completions(api: LiveApi) -> None:
    for answer in (
        api.chat(max_tokens=20, seed=1, ignore_eos=True),
        api.complete(max_tokens=20, seed=1, ignore_eos=True),
    ):
        assert len(answer.token_ids) == 20
        assert answer.text


def test_streams_are_the_same(api: LiveApi) -> None:
    for ask in (api.chat, api.complete):
        for seed in range(3):
            parameters: dict[str, Any] = {"max_tokens": 20, "seed": seed, "n": 2, "stop": ["e"]}
            assert_same(ask(stream=True, **parameters).choices, ask(**parameters).choices)


def test_a_batch_answers_as_one_alone(api: LiveApi) -> None:
    """Prompts of several lengths, so that the padded tier pads."""
    bodies = [
        {"prompt": "The quick brown fox jumps. " * count, "seed": count, "max_tokens": 12, "temperature": temperature}
        for count, temperature in ((1, 0.0), (2, 1.0), (5, 0.0), (3, 0.7))
    ]
    bodies.append({"prompt": "", "max_tokens": 8, "temperature": 0, "logprobs": 2})
    alone = [api.answer(COMPLETIONS, body).choices for body in bodies]
    together = api.together([(COMPLETIONS, body) for body in bodies * 2])
    for one, other in zip(alone * 2, together, strict=True):
        assert [choice.text for choice in other.choices] == [choice.text for choice in one]


def test_without_the_cache(api: LiveApi) -> None:
    cached = api.complete(temperature=0, max_tokens=16, ignore_eos=True)
    assert api.complete(temperature=0, max_tokens=16, ignore_eos=True, use_cache=False).token_ids == cached.token_ids


def test_parameters(api: LiveApi) -> None:
    free = api.complete(temperature=0, max_tokens=16, ignore_eos=True)
    stop = free.text[len(free.text) // 2 :][:2]
    stopped = api.complete(temperature=0, max_tokens=16, ignore_eos=True, stop=stop)
    assert stopped.text == free.text[: free.text.index(stop)]
    only = api.complete(max_tokens=8, ignore_eos=True, allowed_token_ids=[40, 41])
    assert set(only.token_ids) <= {40, 41}
    scored = api.complete(echo=True, max_tokens=0, logprobs=1).choices[0].logprobs
    assert scored is not None
    assert all(entry[1] < 0 for entry in scored[1:])


def test_who_leaves_frees_the_place(api: LiveApi) -> None:
    before = api.metrics()["generation_tokens_total"]
    body = {"prompt": "a", "stream": True, "ignore_eos": True, "max_tokens": CONTEXT - 100}
    with api.client.stream("POST", COMPLETIONS, json=body) as response:
        next(response.iter_bytes())
    api.wait_idle()
    assert api.metrics()["generation_tokens_total"] - before < CONTEXT - 100
