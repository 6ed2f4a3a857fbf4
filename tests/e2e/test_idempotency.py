"""A request that is sent twice under one key, to a real server: generated once, answered twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from support.live_api import CHAT, COMPLETIONS, LiveApi, of_events, of_response
from support.loopback import events

USAGE = {"stream": True, "stream_options": {"include_usage": True}}
MESSAGES = {"messages": [{"role": "user", "content": "Hello!"}]}
NUM_TOKENS = 300
BODY: dict[str, Any] = {"prompt": "The quick", "max_tokens": NUM_TOKENS, "ignore_eos": True, "return_token_ids": True}


def send(api: LiveApi, body: dict[str, Any], key: str, path: str = COMPLETIONS) -> httpx.Response:
    with httpx.Client(base_url=api.server.base_url, timeout=60) as client:
        return client.post(path, json=body, headers={"idempotency-key": key})


def told(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        found = events(response.text)
        return found[0]["id"], of_events(found)
    return response.json()["id"], of_response(response.json())


def test_at_once_and_one_after_the_other(api: LiveApi) -> None:
    """Whole and streamed. The seed is the server's choice: a second generation would be another one."""
    api.wait_idle()
    before = api.metrics()
    bodies = [BODY, BODY | USAGE] * 4
    with ThreadPoolExecutor(len(bodies)) as pool:
        responses = list(pool.map(lambda body: send(api, body, "at-once"), bodies))
    responses += [send(api, body, "at-once") for body in bodies[:2]]
    answers = [told(response) for response in responses]
    assert answers[1:] == answers[:1] * 9
    assert len(answers[0][1].token_ids) == NUM_TOKENS
    replayed = [response.headers.get("idempotent-replayed") for response in responses]
    assert sorted(replayed, key=str) == [None] + ["true"] * 9
    after = api.metrics()
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == NUM_TOKENS
    assert after["joined_requests_total"] - before["joined_requests_total"] == 9


@pytest.mark.parametrize("how", [{}, USAGE], ids=["whole", "stream"])
def test_a_client_that_times_out_and_tries_again(api: LiveApi, how: dict[str, Any]) -> None:
    api.wait_idle()
    key, body, before = f"again-{len(how)}", BODY | how | {"max_tokens": 2000}, api.metrics()
    headers = {"idempotency-key": key}
    if how:
        with api.client.stream("POST", COMPLETIONS, json=body, headers=headers) as response:
            assert next(response.iter_text())
    else:
        with pytest.raises(httpx.ReadTimeout):
            api.client.post(COMPLETIONS, json=body, headers=headers, timeout=0.3)
    again = send(api, body, key)
    assert again.headers["idempotent-replayed"] == "true"
    _, answer = told(again)
    assert len(answer.token_ids) == 2000
    alone = api.complete(BODY["prompt"], max_tokens=2000, ignore_eos=True, seed=answer.seed)
    assert alone.choices == answer.choices
    after = api.metrics()
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 4000


def test_another_request_under_the_same_key(api: LiveApi) -> None:
    send(api, BODY, "taken")
    refused = send(api, BODY | {"temperature": 0}, "taken")
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert told(send(api, MESSAGES | {"max_tokens": 4}, "taken", path=CHAT))


def test_a_key_is_forgotten(start_live_server: Any, llama_directory: Any) -> None:
    server = start_live_server(str(llama_directory), "--num-threads", "1", "--idempotency-seconds", "0.5")
    server.wait_until_ready()
    with LiveApi(server) as api:
        first = told(send(api, BODY, "k"))
        assert told(send(api, BODY, "k")) == first
        api.wait_until(lambda metrics: not metrics["kept_generations"])
        assert told(send(api, BODY, "k"))[0] != first[0]
