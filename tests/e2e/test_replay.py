"""What a real server recorded is run again, on that server and by the command, to the last bit."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.local_server import LocalServer, running_server
from support.live_api import CHAT, COMPLETIONS, LiveApi
from support.live_servers import API_KEY, CONTEXT

FLAGS = ("--num-threads", "1", "--kv-cache-memory", "16MiB")
MESSAGES = {"messages": [{"role": "user", "content": "The quick brown"}]}
SAMPLED = {"n": 2, "seed": 11, "temperature": 0.9, "top_p": 0.95, "max_tokens": 24, "ignore_eos": True, "min_tokens": 6}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, MESSAGES | SAMPLED | {"logprobs": True, "top_logprobs": 3}),
    "chat stream": (CHAT, MESSAGES | SAMPLED | {"stream": True, "stop": ["e", "\n"], "presence_penalty": 0.5}),
    "greedy": (CHAT, MESSAGES | {"temperature": 0, "max_tokens": 16, "ignore_eos": True}),
    "prediction": (CHAT, MESSAGES | SAMPLED | {"prediction": {"type": "content", "content": "The quick brown fox"}}),
    "completion": (COMPLETIONS, SAMPLED | {"prompt": ["The quick", "fox"], "logprobs": 2, "stop": ["ab", "o"]}),
    "echo": (COMPLETIONS, {"prompt": "The quick brown fox", "echo": True, "logprobs": 2, "max_tokens": 6}),
    "masks": (COMPLETIONS, SAMPLED | {"prompt": "The", "bad_words": ["a"], "logit_bias": {"40": 3}}),
    "no seed": (COMPLETIONS, {"prompt": "The", "max_tokens": 8, "use_cache": False, "ignore_eos": True}),
}


class Recorded:
    """A server that records, and where."""

    def __init__(self, server: LocalServer, api: LiveApi, directory: Path) -> None:
        self.server = server
        self.api = api
        self.directory = directory

    def call(self, path: str, body: dict[str, Any]) -> str:
        """The id of the response."""
        response = self.api.post(path, body)
        assert response.status_code == 200, response.text
        text = response.text.removeprefix("data: ").partition("\n\n")[0] if body.get("stream") else response.text
        response_id: str = json.loads(text[text.index("{") :].partition("\n")[0])["id"]
        return response_id

    def path(self, response_id: str) -> Path:
        """The bundle's file, as soon as it is there."""
        path = self.directory / f"{response_id}.json"
        deadline = time.monotonic() + 10
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return path

    def replay(self, **body: Any) -> Any:
        response = self.api.post("/v1/replay", body)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module")
def recorded(llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    directory = tmp_path_factory.mktemp("replay")
    # Requests are made by these, and the command runs them without.
    template = directory / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    made_by = ("--chat-template", str(template), "--generation-defaults", "openai")
    flags = (*FLAGS, *made_by, "--bundle-dir", str(directory / "bundles"), "--served-model-name", "tiny")
    environ = {"REPRISE_API_KEY": API_KEY}
    with (
        running_server(str(llama_directory), *flags, directory=directory, environ=environ) as server,
        LiveApi(server, api_key=API_KEY) as api,
    ):
        yield Recorded(server, api, directory / "bundles")


@pytest.fixture(scope="module")
def bundles(recorded: Recorded) -> dict[str, Path]:
    """A bundle of each call."""
    return {name: recorded.path(recorded.call(*call)) for name, call in CALLS.items()}


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "reprise.cli", "replay", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def edited(path: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    document = json.loads(path.read_text())
    change(document)
    to.write_text(json.dumps(document))
    return to


@pytest.mark.xdist_group("replay")
class TestReplay:
    @pytest.mark.parametrize("name", CALLS)
    def test_the_server_answers_again_to_the_last_bit(
        self, recorded: Recorded, bundles: dict[str, Path], name: str
    ) -> None:
        path, body = bundles[name], CALLS[name][1]
        report = recorded.replay(id=path.stem)
        assert report == recorded.replay(bundle=json.loads(path.read_text()))
        assert (report["identical"], report["same_fingerprint"], report["changes"]) == (True, True, [])
        prompts = body.get("prompt", "")
        assert len(report["choices"]) == (len(prompts) if isinstance(prompts, list) else 1) * body.get("n", 1)
        assert sum(choice["num_tokens"] for choice in report["choices"]) >= 6
        choices = [each for one in json.loads(path.read_text())["generations"] for each in one["choices"]]
        assert [choice["logprobs"] is not None for choice in choices] == [bool(body.get("logprobs"))] * len(choices)

    def test_so_does_the_command_in_any_company(self, bundles: dict[str, Path]) -> None:
        found = command(*bundles.values(), "--times", 2, "--company", 4, "--no-cache", "--json")
        assert found.returncode == 0, found.stderr
        lines = [json.loads(line) for line in found.stdout.splitlines()]
        assert [line["path"] for line in lines] == [str(path) for path in bundles.values()]
        for line in lines:
            report = line["report"]
            assert (line["num_runs"], report["identical"], report["same_fingerprint"]) == (2, True, True), report
            assert report["changes"] == []

    def test_one_altered_token_and_one_altered_bit_are_found_in_their_places(
        self, recorded: Recorded, bundles: dict[str, Path], tmp_path: Path
    ) -> None:
        def token(document: dict[str, Any]) -> None:
            ids = document["generations"][0]["choices"][1]["token_ids"]
            ids[5] = ids[5] - 1 if ids[5] else 1

        def bit(document: dict[str, Any]) -> None:
            values = document["generations"][1]["choices"][0]["logprobs"]["chosen"]
            values[1] = math.nextafter(values[1], 0)

        other_token = edited(bundles["chat"], tmp_path / "token.json", token)
        other_bit = edited(bundles["completion"], tmp_path / "bit.json", bit)
        found = command(other_token, other_bit, "--json")
        assert found.returncode == 1, found.stderr
        by_command = [json.loads(line)["report"] for line in found.stdout.splitlines()]
        by_route = [recorded.replay(bundle=json.loads(path.read_text())) for path in (other_token, other_bit)]
        assert by_command == by_route
        for report, index, kind, position in ((by_route[0], 1, "token", 5), (by_route[1], 2, "logprob", 1)):
            assert not report["identical"]
            assert [choice["index"] for choice in report["choices"] if not choice["identical"]] == [index]
            difference = report["choices"][index]["differences"][0]
            assert (difference["kind"], difference["position"]) == (kind, position)

    def test_other_weights_are_refused(self, bundles: dict[str, Path]) -> None:
        """An ignored end and ids that both models have: pocket could run this request too."""
        arguments = (bundles["greedy"], "--model", "pocket", "--max-model-len", 1024)
        found = command(*arguments)
        assert (found.returncode, found.stdout) == (3, "")
        assert "'pocket' has other weights than the model of chatcmpl-" in found.stderr
        found = command(*arguments, "--ignore-fingerprint")
        assert found.returncode == 1, found.stderr
        assert "  here weights_fingerprint is " in found.stdout
        assert "  choice 0: identical up to token " in found.stdout
        assert "    first difference in token " in found.stdout

    def test_a_model_that_is_gone(self, bundles: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        found = command(bundles["greedy"], "--model", tmp_path / "empty")
        assert (found.returncode, found.stdout) == (3, "")
        assert str(tmp_path / "empty") in found.stderr

    def test_what_a_client_left_is_compared_as_far_as_it_came(self, recorded: Recorded) -> None:
        known = set(recorded.directory.iterdir())
        body = MESSAGES | {"max_tokens": CONTEXT - 100, "ignore_eos": True, "stream": True, "seed": 3, "n": 2}
        with recorded.api.client.stream("POST", CHAT, json=body) as response:
            text = ""
            for piece in response.iter_text():
                text += piece
                if text.count("\n\n") > 20:
                    break
        deadline = time.monotonic() + 10
        while len(left := set(recorded.directory.glob("*.json")) - known) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        report = recorded.replay(id=left.pop().stem)
        assert report["identical"]
        assert [choice["complete"] for choice in report["choices"]] == [False, False]
        assert all(0 < choice["num_tokens"] < CONTEXT - 200 for choice in report["choices"])

    def test_no_key_is_written(self, recorded: Recorded, bundles: dict[str, Path]) -> None:
        texts = [path.read_text() for path in recorded.directory.iterdir()]
        assert len(texts) >= len(bundles)
        for text in texts:
            assert API_KEY not in text
            assert API_KEY[:12] not in text

    def test_a_replay_needs_a_key(self, recorded: Recorded) -> None:
        with LiveApi(recorded.server) as stranger:
            assert stranger.post("/v1/replay", {"id": "cmpl-1"}).status_code == 401

    def test_neither_prompts_nor_answers_are_logged(self, recorded: Recorded, bundles: dict[str, Path]) -> None:
        assert "The quick brown" in bundles["chat"].read_text()
        assert "The quick brown" not in recorded.server.log


def test_a_directory_that_cannot_be_written_ends_the_start(
    start_live_server: Callable[..., LocalServer], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    server = start_live_server("pocket", "--bundle-dir", str(tmp_path / "file" / "bundles"))
    assert server.process.wait(60) == 2
    assert f"bundle_dir: '{tmp_path}/file/bundles' cannot be written to: Not a directory" in server.log
