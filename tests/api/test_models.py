from __future__ import annotations

import pytest

from reprise.generation.interface import EngineState
from support.loopback import Loopback
from support.scripted_engine import READY, ScriptedEngine

pytestmark = pytest.mark.anyio


async def test_list(server: Loopback) -> None:
    body = (await server.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["test/model", "alias"]
    model = body["data"][0]
    assert (model["object"], model["owned_by"]) == ("model", "reprise")
    for name in (
        "tier",
        "tier_reason",
        "dtype",
        "device",
        "max_model_len",
        "architecture",
        "num_parameters",
        "deterministic",
    ):
        assert model[name] == getattr(READY, name)


async def test_the_fingerprint_is_that_of_answers(server: Loopback) -> None:
    answer = (await server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})).json()
    models = (await server.get("/v1/models")).json()["data"]
    assert [model["system_fingerprint"] for model in models] == [answer["system_fingerprint"]] * 2


async def test_one_whose_name_has_a_slash(server: Loopback) -> None:
    for path in ("/v1/models/test/model", "/v1/models/test%2Fmodel"):
        assert (await server.get(path)).json()["id"] == "test/model"


@pytest.mark.parametrize("name", ["unknown", "test", "test/model/", "Test/Model"])
async def test_unknown(server: Loopback, name: str) -> None:
    response = await server.get(f"/v1/models/{name}")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'test/model', 'alias'" in error["message"]


async def test_a_request_of_an_unknown_model(server: Loopback, engine: ScriptedEngine) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [5]}),
    ):
        response = await server.post(path, {**body, "model": "x" * 400})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        assert len(response.json()["error"]["message"]) < 300
    assert not engine.requests


async def test_names_are_known_while_the_model_loads(server: Loopback, engine: ScriptedEngine) -> None:
    engine.state = EngineState.LOADING
    engine.info = None
    model = (await server.get("/v1/models/alias")).json()
    assert (model["id"], model["tier"], model["system_fingerprint"]) == ("alias", None, None)
