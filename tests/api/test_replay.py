from __future__ import annotations

import asyncio
import json
import shutil
import threading
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reprise.errors import GenerationError
from reprise.replay.bundle import Bundle, encode, read_bundle
from reprise.types import ChoiceDelta
from support.loopback import Loopback, Start, eventually
from support.scripted_engine import READY, Item, ScriptedEngine, answer_deltas

pytestmark = pytest.mark.anyio

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}], "logprobs": True, "top_logprobs": 1}
PROMPT: dict[str, Any] = {"prompt": ["Hello", "there"], "n": 2, "seed": 5, "max_tokens": 8}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "bundles"


@pytest.fixture
def recording(start: Start, directory: Path) -> AbstractAsyncContextManager[Loopback]:
    return start(bundle_dir=directory)


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


async def written(directory: Path) -> Bundle:
    """The only bundle, as soon as it is there."""
    await eventually(lambda: [path.suffix for path in files(directory)] == [".json"])
    return read_bundle(files(directory)[0])


def as_json(bundle: Bundle) -> Any:
    return json.loads(encode(bundle))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_is_recorded_and_found_identical(
    recording: AbstractAsyncContextManager[Loopback], directory: Path, engine: ScriptedEngine, stream: bool
) -> None:
    async with recording as server:
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", PROMPT)):
            if stream:
                response_id = (await server.stream(path, body))[0]["id"]
            else:
                response_id = (await server.post(path, body)).json()["id"]
            num_before = len(engine.requests)
            response = await server.post("/v1/replay", {"id": response_id})
            assert response.status_code == 200, response.text
            assert read_bundle(directory / f"{response_id}.json").outcome == "complete"
            report = response.json()
            assert (report["id"], report["identical"], report["same_fingerprint"]) == (response_id, True, True)
            num_choices = 4 if "prompt" in body else 1
            assert [choice["index"] for choice in report["choices"]] == list(range(num_choices))
            assert all(choice["num_tokens"] > 3 for choice in report["choices"])
            again = engine.requests[num_before:]
            assert again == engine.requests[num_before - len(again) : num_before]


async def test_what_is_recorded(
    recording: AbstractAsyncContextManager[Loopback], directory: Path, engine: ScriptedEngine
) -> None:
    async with recording as server:
        body = (await server.post("/v1/completions", PROMPT | {"user": "somebody"})).json()
        bundle = await written(directory)
    assert (bundle.id, bundle.created, bundle.outcome) == (body["id"], body["created"], "complete")
    assert bundle.endpoint == "/v1/completions"
    assert bundle.system_fingerprint == body["system_fingerprint"]
    assert bundle.parameters == PROMPT | {"user": "somebody"}
    assert bundle.settings.device == "cpu"
    assert bundle.settings.tier == "paged"
    assert bundle.settings.model == "pocket"
    assert bundle.model.weights_fingerprint == READY.weights_fingerprint
    assert bundle.text.end_token_ids == engine.tokenizer.end_token_ids
    assert [choice.text for choice in bundle.choices] == [choice["text"] for choice in body["choices"]]
    assert bundle.generations[0].request.sampling.seed == 5


@pytest.mark.parametrize(
    ("found", "setting"), [("native, avx512", "native"), ("torch", "torch"), ("cuda, matmul by tiles", "auto")]
)
async def test_the_kernels_that_were_chosen_are_recorded(
    recording: AbstractAsyncContextManager[Loopback], directory: Path, engine: ScriptedEngine, found: str, setting: str
) -> None:
    engine.info = msgspec.structs.replace(READY, kernels=found)
    async with recording as server:
        await server.post("/v1/completions", PROMPT)
        bundle = await written(directory)
    assert (bundle.model.kernels, bundle.settings.kernels) == (found, setting)


async def test_nothing_is_recorded_unasked(server: Loopback, engine: ScriptedEngine) -> None:
    response_id = (await server.post("/v1/completions", PROMPT)).json()["id"]
    response = await server.post("/v1/replay", {"id": response_id})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "bundles_off")
    assert "bundle_dir" not in response.text
    assert "--bundle-dir" in response.text
    assert not server.app.state.service.generations.on_begin
    assert len(engine.requests) == 2


async def test_a_replay_is_not_recorded(recording: AbstractAsyncContextManager[Loopback], directory: Path) -> None:
    async with recording as server:
        response_id = (await server.post("/v1/completions", PROMPT)).json()["id"]
        await server.post("/v1/replay", {"id": response_id})
        await server.post("/v1/replay", {"bundle": as_json(await written(directory))})
    await asyncio.get_running_loop().shutdown_default_executor()
    assert len(files(directory)) == 1


async def test_a_difference_is_told_with_its_place(
    recording: AbstractAsyncContextManager[Loopback], directory: Path, engine: ScriptedEngine
) -> None:
    async with recording as server:
        response_id = (await server.post("/v1/chat/completions", CHAT)).json()["id"]
        bundle = await written(directory)
        engine.answer = "Hello, earth!"
        report = (await server.post("/v1/replay", {"id": response_id})).json()
        again = (await server.post("/v1/replay", {"bundle": as_json(bundle)})).json()
    assert again == report
    assert not report["identical"]
    (choice,) = report["choices"]
    (difference,) = choice["differences"]
    ids = bundle.choices[0].token_ids
    assert difference["kind"] == "token"
    assert difference["position"] == choice["num_tokens"] > 0
    assert difference["expected"]["token_id"] == ids[choice["num_tokens"]]
    assert difference["found"]["token_id"] != difference["expected"]["token_id"]
    assert difference["before"].endswith("Hello,") or difference["before"].endswith("Hello, ")


async def test_another_fingerprint_is_told(
    recording: AbstractAsyncContextManager[Loopback], engine: ScriptedEngine
) -> None:
    async with recording as server:
        response_id = (await server.post("/v1/chat/completions", CHAT)).json()["id"]
        engine.info = msgspec.structs.replace(READY, weights_fingerprint="other")
        report = (await server.post("/v1/replay", {"id": response_id})).json()
    assert (report["identical"], report["same_fingerprint"]) == (True, False)
    assert report["changes"] == [
        {"name": "weights_fingerprint", "expected": READY.weights_fingerprint, "found": "other"}
    ]


async def test_other_defaults_and_another_template_change_nothing(
    recording: AbstractAsyncContextManager[Loopback],
) -> None:
    async with recording as server:
        service = server.app.state.service
        response_id = (await server.post("/v1/chat/completions", CHAT)).json()["id"]
        before = service.fingerprint(READY)
        changes = {"chat_template_fingerprint": "other", "generation_defaults": {"temperature": 0.5}}
        service.text = msgspec.structs.replace(service.text, **changes)
        assert service.fingerprint(READY) != before
        report = (await server.post("/v1/replay", {"id": response_id})).json()
        assert (report["identical"], report["same_fingerprint"], report["changes"]) == (True, True, [])


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_is_expected_again(
    recording: AbstractAsyncContextManager[Loopback], directory: Path, engine: ScriptedEngine, stream: bool
) -> None:
    script: list[Item] = [
        ChoiceDelta(index=0, text="a", token_ids=[40]),
        GenerationError("broken", code="numerical_error"),
    ]
    async with recording as server:
        engine.enqueue(script)
        response = await server.post("/v1/completions", {"prompt": "a", "stream": stream})
        assert response.status_code == (200 if stream else 500)
        bundle = await written(directory)
        assert (bundle.outcome, bundle.error and bundle.error.code) == ("failed", "numerical_error")
        engine.enqueue(script)
        assert (await server.post("/v1/replay", {"id": bundle.id})).json()["identical"]
        engine.enqueue([script[0], ChoiceDelta(index=0, text="b", token_ids=[41])])
        report = (await server.post("/v1/replay", {"id": bundle.id})).json()
        assert (report["identical"], report["found_error"]) == (False, None)


async def test_the_siblings_of_a_failed_choice_may_have_come_less_far(
    recording: AbstractAsyncContextManager[Loopback], directory: Path, engine: ScriptedEngine
) -> None:
    first, *siblings = [ChoiceDelta(index=n > 0, text="a", token_ids=[40 + n]) for n in range(4)]
    broken = GenerationError("broken", code="numerical_error")
    async with recording as server:
        engine.enqueue([first, *siblings, broken])
        assert (await server.post("/v1/completions", {"prompt": "a", "n": 2})).status_code == 500
        bundle = await written(directory)
        engine.enqueue([first, siblings[0], broken])
        report = (await server.post("/v1/replay", {"id": bundle.id})).json()
        assert (report["identical"], [choice["num_tokens"] for choice in report["choices"]]) == (True, [1, 1])
        engine.enqueue([first, siblings[1], broken])
        assert not (await server.post("/v1/replay", {"id": bundle.id})).json()["identical"]


@pytest.mark.parametrize(("code", "status"), [("capacity", 503), ("request_timeout", 504), ("incomplete", 500)])
async def test_what_befalls_a_replay_is_told_as_of_any_request(
    recording: AbstractAsyncContextManager[Loopback], engine: ScriptedEngine, code: str, status: int
) -> None:
    async with recording as server:
        response_id = (await server.post("/v1/completions", {"prompt": "a"})).json()["id"]
        engine.enqueue([ChoiceDelta(index=0, text="a", token_ids=[40]), GenerationError("no", code=code)])
        response = await server.post("/v1/replay", {"id": response_id})
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert response.headers["x-should-retry"] == ("true" if status == 503 else "false")
        assert (await server.post("/v1/replay", {"id": response_id})).json()["identical"]


async def test_what_came_until_the_client_left_is_compared(
    recording: AbstractAsyncContextManager[Loopback], directory: Path, engine: ScriptedEngine
) -> None:
    begun = [ChoiceDelta(index=0, text="a", token_ids=[40]), ChoiceDelta(index=0, text="b", token_ids=[41])]
    async with recording as server:
        engine.enqueue([*begun, asyncio.Event()])
        async with server.client.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as response:
            assert response.status_code == 200
            await eventually(lambda: engine.streams[0].num_entries == 2)
        bundle = await written(directory)
        assert (bundle.outcome, bundle.choices[0].token_ids, bundle.choices[0].text) == ("aborted", [40, 41], "ab")
        engine.enqueue([*begun, ChoiceDelta(index=0, text="c", token_ids=[42]), asyncio.Event()])
        report = (await server.post("/v1/replay", {"id": bundle.id})).json()
        assert report["identical"]
        assert [(choice["num_tokens"], choice["complete"]) for choice in report["choices"]] == [(2, False)]
        await eventually(lambda: engine.streams[-1].closed)


async def test_a_client_that_leaves_ends_its_replay(
    recording: AbstractAsyncContextManager[Loopback], engine: ScriptedEngine
) -> None:
    async with recording as server:
        response_id = (await server.post("/v1/completions", {"prompt": "a"})).json()["id"]
        engine.enqueue(None)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(server.post("/v1/replay", {"id": response_id}), 0.3)
        await eventually(lambda: engine.streams[-1].closed)
        await eventually(lambda: server.app.state.service.admission.num_reserved == 0)
        assert server.app.state.service.generations.idle.is_set()


async def test_a_replay_waits_in_line_like_any_request(start: Start, engine: ScriptedEngine, directory: Path) -> None:
    async with start(bundle_dir=directory, max_num_seqs=2, max_waiting_seqs=0, max_num_batched_tokens=2) as server:
        response_id = (await server.post("/v1/completions", {"prompt": "a", "n": 2})).json()["id"]
        engine.enqueue(None)
        holding = asyncio.create_task(server.post("/v1/completions", {"prompt": "a"}))
        await eventually(lambda: len(engine.requests) == 2)
        response = await server.post("/v1/replay", {"id": response_id})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)


async def test_few_bundles_are_loaded_at_once_and_each_has_its_place(
    recording: AbstractAsyncContextManager[Loopback], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with recording as server:
        service, loading, go = server.app.state.service, [], asyncio.Event()

        async def get(response_id: str) -> None:
            loading.append(response_id)
            await go.wait()

        monkeypatch.setattr(service.bundles, "get", get)
        replays = [asyncio.create_task(server.post("/v1/replay", {"id": f"cmpl-{number}"})) for number in range(4)]
        await eventually(lambda: service.admission.num_reserved == 4)
        assert len(loading) == 2
        go.set()
        assert [response.status_code for response in await asyncio.gather(*replays)] == [404] * 4
        assert len(loading) == 4
        assert service.admission.num_reserved == 0


async def test_one_that_is_computed_again_leaves_the_first_ones_bundle(
    recording: AbstractAsyncContextManager[Loopback], directory: Path
) -> None:
    async with recording as server:
        body = {"prompt": "a", "stream": True, "seed": 5}
        async with server.client.stream("POST", "/v1/completions", json=body) as response:
            text = (await response.aread()).decode()
        before = (await written(directory), files(directory)[0].stat().st_mtime_ns)
        last = next(line[4:] for line in text.splitlines() if line.startswith("id: "))
        again = await server.client.post("/v1/completions", json=body, headers={"Last-Event-ID": last})
        assert again.status_code == 200
        service = server.app.state.service
        assert service.generations.num_recomputed == 1
        assert await service.bundles.get(before[0].id) == before[0]
        assert files(directory)[0].stat().st_mtime_ns == before[1]


async def test_a_replay_is_refused_while_the_server_shuts_down(
    recording: AbstractAsyncContextManager[Loopback],
) -> None:
    async with recording as server:
        service = server.app.state.service
        service.draining = True
        response = await server.post("/v1/replay", {"id": "cmpl-1"})
        assert response.status_code == 503


@pytest.mark.parametrize("response_id", ["cmpl-1", "../secret", "..", "/etc/passwd", "cmpl-1/../../secret", "a\0b", ""])
async def test_an_unknown_id_is_not_found(
    recording: AbstractAsyncContextManager[Loopback], directory: Path, response_id: str
) -> None:
    async with recording as server:
        for name in ("secret", "secret.json"):
            directory.with_name(name).write_text('{"format": 2}')
        response = await server.post("/v1/replay", {"id": response_id})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "bundle_not_found")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1}', None], ids=str)
async def test_a_file_that_is_no_bundle_is_the_servers_fault_and_its_place_a_secret(
    recording: AbstractAsyncContextManager[Loopback],
    directory: Path,
    caplog: pytest.LogCaptureFixture,
    content: str | None,
) -> None:
    async with recording as server:
        path = directory / "cmpl-1.json"
        if content is None:
            path.mkdir()
        else:
            path.write_text(content)
        response = await server.post("/v1/replay", {"id": "cmpl-1"})
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["code"]) == (500, "server_error", "bundle_unreadable")
        assert str(directory) not in response.text
        assert "cmpl-1.json" not in response.text
        (record,) = [record for record in caplog.records if record.name == "reprise.api.replay"]
        assert record.levelname == "ERROR"
        assert str(path) in record.message
        assert response.headers["x-request-id"] in record.message
        await eventually(lambda: server.app.state.service.admission.num_reserved == 0)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "id", "either"),
        ({"id": "a", "bundle": {}}, "id", "either"),
        ({"id": 1}, "id", "a string"),
        ({"id": "a" * 600}, "id", "at most 512"),
        ({"bundle": []}, "bundle", "an object"),
        ({"bundle": {}}, "bundle", "must be a JSON object whose 'format' is 2"),
        ({"bundle": {"format": 2}}, "bundle", "missing required field"),
        ({"bundles": {}}, "bundles", "Did you mean 'bundle'?"),
    ],
)
async def test_bad_requests_are_told(server: Loopback, body: Any, param: str, message: str) -> None:
    response = await server.post("/v1/replay", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert message in response.json()["error"]["message"]


async def test_a_bundle_that_asks_for_too_much_is_refused(
    recording: AbstractAsyncContextManager[Loopback], directory: Path, engine: ScriptedEngine
) -> None:
    async with recording as server:
        await server.post("/v1/completions", PROMPT)
        bundle = await written(directory)
        changed = as_json(bundle)
        changed["generations"][0]["request"]["sampling"]["max_tokens"] = 10**9
        num_before = len(engine.requests)
        response = await server.post("/v1/replay", {"bundle": changed})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, "bundle", "invalid_bundle")
        assert "'max_tokens' is 1000000000" in error["message"]
        assert len(engine.requests) == num_before
        await eventually(lambda: server.app.state.service.admission.num_reserved == 0)


async def test_a_directory_that_goes_away_disturbs_nobody(
    recording: AbstractAsyncContextManager[Loopback], directory: Path
) -> None:
    async with recording as server:
        shutil.rmtree(directory)
        directory.write_text("no directory")  # noqa: ASYNC240 # nobody waits for it
        for _ in range(3):
            assert (await server.post("/v1/completions", PROMPT)).status_code == 200
        store = server.app.state.service.bundles
        await eventually(lambda: store.num_failed == 3)
        text = (await server.get("/metrics")).text
        assert "reprise_bundles_failed_total 3.0" in text
        assert "reprise_bundles_written_total 0.0" in text


async def test_what_has_ended_is_written_before_the_server_ends(
    recording: AbstractAsyncContextManager[Loopback], directory: Path, engine: ScriptedEngine
) -> None:
    async with recording as server:
        for _ in range(20):
            await server.post("/v1/completions", {"prompt": "a"})
        engine.enqueue([*answer_deltas(engine.tokenizer, "a b c d", engine.requests[0])[:2], asyncio.Event()])
        waiting = asyncio.create_task(server.post("/v1/completions", {"prompt": "a"}))
        await eventually(lambda: len(engine.streams) == 21 and engine.streams[-1].num_entries == 2)
    await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()  # as at the end of `reprise serve`
    outcomes = sorted(read_bundle(path).outcome for path in files(directory))
    assert outcomes == ["aborted", *["complete"] * 20]


async def test_the_loop_goes_on_while_the_last_bundles_are_written(
    recording: AbstractAsyncContextManager[Loopback], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, written_all, closed = asyncio.get_running_loop(), threading.Event(), threading.Event()

    def close() -> None:
        loop.call_soon_threadsafe(written_all.set)
        if written_all.wait(5):
            closed.set()

    async with recording as server:
        monkeypatch.setattr(server.app.state.service.bundles, "close", close)
    await loop.shutdown_default_executor()
    assert closed.is_set(), "somebody waited on the loop"


def REQUEST_LIKE(engine: ScriptedEngine) -> Any:  # noqa: N802 # placeholder
    return engine.requests[0]
