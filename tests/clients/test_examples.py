"""Every example in clients/ runs as it is against a live server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CLIENTS = Path(__file__).parents[2] / "clients"
PYTHON_EXAMPLES = sorted([*(CLIENTS / "python/examples").glob("*.py"), *(CLIENTS / "openai").glob("*.py")])
CURL_EXAMPLES = ("chat", "stream", "completions", "resume")


def run(command: list[str], base_url: str, **environ: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name not in ("API_KEY", "MODEL")}
    finished = subprocess.run(
        command,
        env=variables | {"BASE_URL": base_url, "PYTHONPATH": str(CLIENTS / "python/src")} | environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize("example", PYTHON_EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_python_example(example: Path, live_base_url: str) -> None:
    output = run([sys.executable, "-W", "error", str(example)], live_base_url)
    assert output.strip()


def test_there_are_examples() -> None:
    assert len(PYTHON_EXAMPLES) == 6
    assert {path.name for path in (CLIENTS / "curl").iterdir()} == {*CURL_EXAMPLES, "README.md"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
class TestCurl:
    def test_chat(self, live_base_url: str) -> None:
        answer = json.loads(run([str(CLIENTS / "curl/chat")], live_base_url))
        assert "Paris" in answer["choices"][0]["message"]["content"]

    def test_stream(self, live_base_url: str) -> None:
        output = run([str(CLIENTS / "curl/stream")], live_base_url)
        lines = [line for line in output.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] > 0

    def test_resume(self, live_base_url: str) -> None:
        """Two connections, one stream: each position comes once, and the last event is the end."""
        lines = [line for line in run([str(CLIENTS / "curl/resume")], live_base_url).splitlines() if line]
        ids = [line for line in lines if line.startswith("id: ")]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        assert len(ids) == len(set(ids)) == len(chunks) > 4
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert ["reprise" in chunk for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
        assert [bool(chunk["choices"][0]["finish_reason"]) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]

    def test_completions(self, live_base_url: str) -> None:
        answer = json.loads(run([str(CLIENTS / "curl/completions")], live_base_url))
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]

    def test_a_refusal_is_a_failure_with_the_reason(self, live_base_url: str) -> None:
        with pytest.raises(AssertionError, match="model_not_found"):
            run([str(CLIENTS / "curl/chat")], live_base_url, MODEL="nobody")
