"""The promise over HTTP: fifty requests get the same bytes in every circumstance, compared with `==`.

What is expected is what a server answers when it is asked one request after another; `support.promise` has the requests
and says what of an answer is compared.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.local_server import running_server
from reprise.engine.native.library import built_variants
from support import variant_server
from support.engine_processes import engine_pids
from support.live_api import CHAT, Call, LiveApi
from support.one_order import any_order
from support.promise import (
    InFlight,
    all_at_once,
    ask,
    assert_same,
    differences,
    first_choice,
    one_by_one,
    other_load,
    requests,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the engine's process is found in /proc")

FLAGS = ("--served-model-name", "m", "--num-threads", "1", "--max-model-len", "1024")
CASES = [("wide", "float32", "native"), ("wide", "bfloat16", "torch"), ("pocket", "bfloat16", "auto")]
ENOUGH_MEMORY = "32MiB"
SCARCE_KIBIBYTES = {("wide", "float32"): 2650, ("wide", "bfloat16"): 1325, ("pocket", "bfloat16"): 2620}
"""Of KV cache for hardly more than the 1024 tokens that one request may have."""
NUM_TOKENS_UNCACHED = 10


@dataclass
class Served:
    """A model in a number format, a server of it that all tests share, and what it answers when asked one by one."""

    model: str
    flags: tuple[str, ...]
    scarce_memory: str
    directory: Path
    api: LiveApi
    expected: list[bytes]

    @contextmanager
    def another(self, *flags: str) -> Iterator[LiveApi]:
        """A client of a further server, which has these flags as well."""
        memory = () if "--kv-cache-memory" in flags else ("--kv-cache-memory", ENOUGH_MEMORY)
        arguments = (self.model, *self.flags, *memory, *flags)
        with running_server(*arguments, directory=self.directory) as server, LiveApi(server) as api:
            yield api

    @property
    def client(self) -> httpx.Client:
        return self.api.client


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, id="-".join(case), marks=pytest.mark.xdist_group("-".join(case))) for case in CASES],
)
def served(
    request: pytest.FixtureRequest, wide_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    model, dtype, kernels = request.param
    flags = (*FLAGS, "--dtype", dtype, "--kernels", kernels if built_variants() else "torch")
    directory = tmp_path_factory.mktemp("promise")
    path = str(wide_directory) if model == "wide" else model
    arguments = (path, *flags, "--kv-cache-memory", ENOUGH_MEMORY)
    with running_server(*arguments, directory=directory) as server, LiveApi(server) as api:
        expected = one_by_one(api.client, requests())
        yield Served(path, flags, f"{SCARCE_KIBIBYTES[model, dtype]}KiB", directory, api, expected)


def test_the_requests_are_of_all_kinds(served: Served) -> None:
    """What is compared below is not all alike, and what the parameters are for does happen."""
    choices = [choice for answer in served.expected for choice in json.loads(answer)["choices"]]
    assert all(json.loads(answer)["reprise"]["deterministic"] for answer in served.expected)
    assert len({json.dumps(choice.get("message", choice.get("text"))) for choice in choices}) > 50
    assert {choice["finish_reason"] for choice in choices} == {"stop", "length"}
    assert len([choice for choice in choices if isinstance(choice["stop_reason"], str)]) >= 3
    texts = "".join(str(choice.get("message", choice.get("text"))) for choice in choices)
    assert any("\u4e00" <= character <= "\u9fff" for character in texts)
    assert sum(choice["logprobs"] is not None for choice in choices) > 25
    assert sum(len(choice["token_ids"]) for choice in choices) > 1000


def test_again_with_a_warm_prefix_cache(served: Served) -> None:
    before = served.api.metrics()["cached_prompt_tokens_total"]
    assert_same(one_by_one(served.client, requests()), served.expected)
    assert served.api.metrics()["cached_prompt_tokens_total"] > before + 3000


def test_all_at_once_beside_others(served: Served) -> None:
    with other_load(served.client):
        assert_same(all_at_once(served.client, requests()), served.expected)


def test_streamed_beside_others(served: Served) -> None:
    with other_load(served.client):
        assert_same(all_at_once(served.client, requests(stream=True)), served.expected)


def test_alone_or_the_first_of_two(served: Served) -> None:
    single = [index for index, (_, body) in enumerate(requests()) if "n" not in body]
    calls = [(path, {**body, "n": 2}) for path, body in requests()]
    found = all_at_once(served.client, [calls[index] for index in single])
    expected = [served.expected[index] for index in single]
    assert [first_choice(answer) for answer in found] == [first_choice(answer) for answer in expected]
    seconds = [json.loads(answer)["choices"][-1] for answer in found]
    firsts = [first_choice(answer) for answer in found]
    assert sum(a["token_ids"] != b["token_ids"] for a, b in zip(firsts, seconds, strict=True)) > len(single) // 2


def test_with_use_cache_false(served: Served) -> None:
    """Shorter: each token costs a pass over everything before it."""
    expected = one_by_one(served.client, requests(most_tokens=NUM_TOKENS_UNCACHED))
    calls = requests(most_tokens=NUM_TOKENS_UNCACHED, use_cache=False)
    assert_same(all_at_once(served.client, calls), expected)


def test_chunks_and_blocks_of_other_sizes_without_prefix_cache(served: Served) -> None:
    flags = ("--max-num-batched-tokens", "48", "--max-num-seqs", "6", "--block-size", "32", "--no-prefix-cache")
    with served.another(*flags) as api:
        for streamed in (False, True):
            assert_same(all_at_once(api.client, requests(stream=streamed)), served.expected)
        assert api.metrics()["cached_prompt_tokens_total"] == 0


def test_preempted_and_recomputed(served: Served) -> None:
    """Beside it, steps of other sizes again, now with a prefix cache."""
    flags = ("--kv-cache-memory", served.scarce_memory, "--max-num-batched-tokens", "129", "--block-size", "8")
    with served.another(*flags) as api:
        for streamed in (False, True):
            assert_same(all_at_once(api.client, requests(stream=streamed)), served.expected)
        metrics = api.metrics()
        assert metrics["num_preemptions_total"] >= 5
        assert 1024 <= metrics["kv_cache_tokens"] < 1100


def killed_in_their_midst(served: Served, calls: Sequence[Call], expected: Sequence[bytes]) -> list[bytes]:
    """The answers to calls whose engine is killed when ten streams have tokens, and most have not ended.

    It stands still until all have come: else a fast engine has answered the first before the last are sent.
    """
    (engine,) = engine_pids(served.api.server)
    before = served.api.metrics()
    num_choices = sum(len(json.loads(answer)["choices"]) for answer in expected)
    os.kill(engine, signal.SIGSTOP)
    with InFlight(served.client, calls) as streams:
        try:
            served.api.wait_until(lambda metrics: metrics["num_requests_waiting"] == num_choices, seconds=5)
        finally:
            os.kill(engine, signal.SIGCONT)
        streams.wait(
            lambda: sum(folded.num_tokens > 0 for folded in streams.folded) >= 10,
            lambda: os.kill(engine, signal.SIGKILL),
        )
        found = streams.answers()
    after = served.api.metrics()
    assert after["engine_restarts_total"] == before["engine_restarts_total"] + 1
    assert after["choices_recovered_total"] > before["choices_recovered_total"] + num_choices // 2
    assert engine_pids(served.api.server) != [engine]
    return found


def test_killed_meanwhile_and_after(served: Served) -> None:
    assert_same(killed_in_their_midst(served, requests(), served.expected), served.expected)
    assert_same(all_at_once(served.client, requests()), served.expected)


def test_another_server_and_replicas(served: Served) -> None:
    """A server that was started again is one that was started later: the second here, asked in turns with the first.

    It guesses tokens ahead, too, where there is anything to guess from: `tests/engine/test_speculation.py` has more.
    """
    with served.another("--speculate", "ngram") as replica:
        alone = one_by_one(replica.client, requests())
        clients = [served.client, replica.client] * 25
        with ThreadPoolExecutor(50) as pool:
            found = list(pool.map(ask, clients, requests()))
            crossed = list(pool.map(ask, reversed(clients), requests(stream=True)))
    assert_same(found, served.expected)
    assert_same(crossed, served.expected)
    assert_same(alone, served.expected)


def test_with_predictions(served: Served) -> None:
    """Of the whole answer, of its first half with another end, and of something else; and through a death as well."""
    calls, expected = [], []
    for (path, body), answer in zip(requests(), served.expected, strict=True):
        if path == CHAT:
            said = json.loads(answer)["choices"][0]["message"]["content"]
            for content in (said, said[: len(said) // 2] + " and so on", "Something else entirely."):
                prediction = {"type": "content", "content": content}
                calls.append((path, {**body, "prediction": prediction}))
                expected.append(without_details(answer))
    before = served.api.metrics()
    found = one_by_one(served.client, calls)
    assert_same([*map(without_details, found)], expected)
    assert served.api.metrics()["kept_draft_tokens_total"] > before["kept_draft_tokens_total"] + 20
    details = [json.loads(answer)["usage"]["completion_tokens_details"] for answer in found]
    assert sum(counts["accepted_prediction_tokens"] for counts in details) > 50
    assert sum(counts["rejected_prediction_tokens"] for counts in details) > 50
    # What is counted does not depend on what was guessed, either.
    streamed = [(path, {**body, "stream": True}) for path, body in calls]
    assert_same(all_at_once(served.client, streamed), found)
    assert_same(killed_in_their_midst(served, calls, found), found)


def without_details(answer: bytes) -> bytes:
    """Without what is counted of a prediction, which an answer that has none does not count."""
    whole = json.loads(answer)
    del whole["usage"]["completion_tokens_details"]
    return json.dumps(whole, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")


def test_with_a_draft_model(served: Served) -> None:
    """It is the model itself, so that its guesses are right: what it draws ahead of sampled answers, too."""
    with served.another("--speculate", "draft", "--draft-model", served.model) as api:
        alone = one_by_one(api.client, requests())
        metrics = api.metrics()
        together = all_at_once(api.client, requests(stream=True))
    assert_same(alone, served.expected)
    assert_same(together, served.expected)
    assert metrics["kept_draft_tokens_total"] > 100


VARIANTS: dict[str, dict[str, Any]] = {
    "a kernel swapped": {
        "module": "support.variant_server",
        "environ": {**variant_server.ENVIRON, **any_order()},
        "flags": ("--kernels", "torch"),
    },
    "switched off": {"flags": ("--no-deterministic",), "environ": any_order()},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_fixed_kernels_answers_differ(variant: str, wide_directory: Path, tmp_path: Path) -> None:
    """These comparisons can fail: where attention is torch's own, and the server says so."""
    options = {**VARIANTS[variant]}
    arguments = (*FLAGS, "--dtype", "float32", "--kv-cache-memory", ENOUGH_MEMORY, *options.pop("flags", ()))
    running = running_server(str(wide_directory), *arguments, directory=tmp_path, **options)
    with running as server, LiveApi(server) as api:
        expected = one_by_one(api.client, requests())
        found = [all_at_once(api.client, requests(stream=streamed)) for streamed in (False, True)]
    assert any(differences(answers, expected) for answers in found)
    assert all(json.loads(answer)["reprise"]["deterministic"] is False for answer in expected)
