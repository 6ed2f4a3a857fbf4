"""A broken connection is a pause: real servers, real weights, cuts anywhere, on the same server and on another one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.local_server import LocalServer, running_server
from support.live_api import CHAT, COMPLETIONS, Answer, Call, LiveApi, of_events
from support.loopback import events_with_ids

FLAGS = ("--served-model-name", "tiny", "--num-threads", "1", "--kv-cache-memory", "16MiB")
PROMPT = "The quick brown 好 fox"
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
Events = Sequence[tuple[Any, str | None]]

BODIES: list[Call] = [
    (CHAT, {"messages": [{"role": "user", "content": PROMPT}], "n": 2, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "return_token_ids": True}),
    (CHAT, {"messages": [{"role": "user", "content": PROMPT}], "stop": ["e", "好"], "ignore_eos": True}),
    (COMPLETIONS, {"prompt": PROMPT, "ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False}),
    (COMPLETIONS, {"prompt": [PROMPT, "def main():", ""], "n": 2, "echo": True, "logprobs": 1}),
    (COMPLETIONS, {"prompt": PROMPT, "stop": ["the", "a b"], "frequency_penalty": 1.5, "bad_words": ["x"], "n": 2}),
    (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}),
]


def body_of(body: dict[str, Any], **more: Any) -> dict[str, Any]:
    """It names no seed: what follows has to know the server's own choice."""
    return {"max_tokens": 24} | body | USAGE | more


@pytest.fixture(scope="module")
def replica(llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A second server process of the same weights, with another size of pool and of batches."""
    flags = (*FLAGS[:-1], "8MiB", "--max-num-seqs", "3", "--max-num-batched-tokens", "16")
    with running_server(str(llama_directory), *flags, directory=tmp_path_factory.mktemp("replica")) as server:
        yield server


@pytest.fixture
def other(replica: LocalServer) -> Iterator[LiveApi]:
    with LiveApi(replica) as client:
        yield client


def whole_of(api: LiveApi, call: Call) -> Events:
    response = api.post(*call)
    assert response.status_code == 200, response.text
    return events_with_ids(response.text)


def rest_of(api: LiveApi, call: Call, last: str | None) -> Events:
    response = api.client.post(call[0], json=call[1], headers={"last-event-id": last or ""})
    assert response.status_code == 200, response.text
    return events_with_ids(response.text)


def folded(*parts: Events) -> Answer:
    """Without what tells of the machine: how much of the prompt had been computed before."""
    answer = of_events([event for part in parts for event, _ in part])
    assert answer.usage is not None
    answer.usage = {name: count for name, count in answer.usage.items() if name != "prompt_tokens_details"}
    return answer


@pytest.mark.parametrize("call", BODIES, ids=lambda call: "+".join(call[1])[:40] if isinstance(call, tuple) else "")
def test_every_cut_computed_again_on_another_server(api: LiveApi, other: LiveApi, call: Call) -> None:
    call = call[0], body_of(call[1])
    whole = whole_of(api, call)
    expected = folded(whole)
    cuts = range(1, len(whole))
    for cut in cuts if len(cuts) < 24 else sorted(random.Random(1).sample(cuts, 24)):
        for server in (other, api) if cut % 4 == 0 else (other,):
            assert folded(whole[:cut], rest_of(server, call, whole[cut - 1][1])) == expected


@pytest.mark.parametrize("call", BODIES[:5], ids=lambda call: "+".join(call[1])[:40] if isinstance(call, tuple) else "")
def test_every_cut_read_on_from_what_is_held(api: LiveApi, call: Call) -> None:
    call = call[0], body_of(call[1], retain_seconds=60)
    whole = whole_of(api, call)
    api.wait_idle()
    before = api.metrics()
    for cut in range(1, len(whole)):
        rest = rest_of(api, call, whole[cut - 1][1])
        assert folded(whole[:cut], rest) == folded(whole)
        # The very same events, as nothing was merged otherwise.
        assert rest[-2:] == whole[-2:] or len(rest) == 1
    after = api.metrics()
    assert after["attached_streams_total"] - before["attached_streams_total"] == len(whole) - 1
    assert after["recomputed_streams_total"] == before["recomputed_streams_total"]
    assert after["generation_tokens_total"] == before["generation_tokens_total"]


def cut_off(client: httpx.Client, call: Call, *, num_characters: int = 4000, last: str | None = None) -> Events:
    """The whole events among the first characters of a stream, whose connection is then broken."""
    seen = ""
    headers = {} if last is None else {"last-event-id": last}
    with client.stream("POST", call[0], json=call[1], headers=headers) as response:
        for text in response.iter_text():
            seen += text
            if len(seen) > num_characters:
                break
    assert "[DONE]" not in seen
    return events_with_ids(seen[: seen.rindex("\n\n") + 2])


LONG = {"prompt": PROMPT, "ignore_eos": True, "max_tokens": 600, "return_token_ids": True}


def test_a_running_generation_is_read_on(api: LiveApi) -> None:
    call = COMPLETIONS, body_of(LONG, retain_seconds=60, max_tokens=600)
    before = api.metrics()
    begun = cut_off(api.client, call)
    # The second one leaves as well.
    parts: list[Events] = [begun, cut_off(api.client, call, last=begun[-1][1])]
    parts.append(rest_of(api, call, parts[-1][-1][1]))
    found = folded(*parts)
    assert len(found.token_ids) == 600
    seed = begun[0][0]["reprise"]["seed"]
    alone = api.complete(PROMPT, ignore_eos=True, max_tokens=600, seed=seed)
    assert found.choices == alone.choices
    after = api.metrics()
    assert after["attached_streams_total"] - before["attached_streams_total"] == 2
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 1200


def test_after_its_time_it_is_computed_again(api: LiveApi) -> None:
    call = COMPLETIONS, body_of(LONG, retain_seconds=0.3, max_tokens=3000)
    before = api.metrics()
    begun = cut_off(api.client, call)
    api.wait_until(lambda metrics: metrics["kept_generations"] > before["kept_generations"])
    api.wait_idle()
    found = folded(begun, rest_of(api, call, begun[-1][1]))
    seed = begun[0][0]["reprise"]["seed"]
    assert found.choices == api.complete(PROMPT, ignore_eos=True, max_tokens=3000, seed=seed).choices
    after = api.metrics()
    assert after["recomputed_streams_total"] - before["recomputed_streams_total"] == 1


def test_without_being_asked_nothing_is_kept(api: LiveApi) -> None:
    before = api.metrics()
    cut_off(api.client, (COMPLETIONS, body_of(LONG, max_tokens=3000)))
    api.wait_idle()
    after = api.metrics()
    assert after["generation_tokens_total"] - before["generation_tokens_total"] < 3000


def test_a_server_that_is_killed_in_the_midst(llama_directory: Path, tmp_path: Path, other: LiveApi) -> None:
    """Its streams go on at another one, to the byte."""
    calls = [(COMPLETIONS, body_of(LONG, max_tokens=600, temperature=t)) for t in (0.0, 0.7, 1.0)]
    with ExitStack() as stack:
        server = stack.enter_context(running_server(str(llama_directory), *FLAGS, directory=tmp_path))
        client = stack.enter_context(httpx.Client(base_url=server.base_url, timeout=60))
        streams = [stack.enter_context(client.stream("POST", path, json=body)) for path, body in calls]
        texts = []
        for stream in streams:
            text = ""
            for piece in stream.iter_text():
                text += piece
                if len(text) > 3000:
                    break
            texts.append(text[: text.rindex("\n\n") + 2])
        server.process.kill()
    for call, text in zip(calls, texts, strict=True):
        begun = events_with_ids(text)
        found = folded(begun, rest_of(other, call, begun[-1][1]))
        seed = begun[0][0]["reprise"]["seed"]
        temperature = call[1]["temperature"]
        alone = other.complete(PROMPT, ignore_eos=True, max_tokens=600, seed=seed, temperature=temperature)
        assert found.choices == alone.choices


def test_other_weights_do_not_go_on(api: LiveApi, live_server: LocalServer) -> None:
    call = COMPLETIONS, {"prompt": PROMPT, "stream": True, "max_tokens": 4}
    last = whole_of(api, call)[0][1]
    response = httpx.post(live_server.base_url + call[0], json=call[1], headers={"last-event-id": str(last)})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "cannot_resume")
    assert "fingerprint" in response.json()["error"]["message"]
