"""`reprise replay` up to the loading of a model; tests/e2e/test_replay.py loads one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from reprise.cli import cli
from reprise.errors import BundleError, ConfigError
from reprise.ipc.messages import EngineConfig
from reprise.replay.bundle import Bundle, encode
from reprise.replay_command import Circumstances, Replayed, ReplayExitCode, text_of
from reprise.settings import Settings
from support.bundles import bundle


def invoke(*arguments: str, environ: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli, ["replay", *arguments], prog_name="reprise", env=environ, terminal_width=110)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    settings = EngineConfig(model="some/model", revision="abc", device="cpu", dtype="bfloat16", num_threads=3)
    file = tmp_path / "cmpl-1.json"
    file.write_bytes(encode(bundle(settings=settings)))
    return file


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the command hands over instead of running it."""
    calls: list[tuple[Any, ...]] = []

    def run(bundles: Sequence[tuple[Path, Bundle, Settings]], circumstances: Circumstances, *, as_json: bool) -> int:
        calls.append((bundles, circumstances, as_json))
        return ReplayExitCode.DIFFERENT

    monkeypatch.setattr("reprise.replay_command.run", run)
    return calls


def test_settings_are_the_bundles_unless_a_flag_says_otherwise(path: Path, seen: list[tuple[Any, ...]]) -> None:
    result = invoke(
        str(path), str(path), "--dtype", "float32", "--no-deterministic", "--kv-cache-memory", "1GiB",
        environ={"REPRISE_DEVICE": "cuda", "REPRISE_PORT": "nonsense"},
    )  # fmt: skip
    assert result.exit_code == 1
    ((bundles, circumstances, as_json),) = seen
    expected = Settings(
        model="some/model", revision="abc", device="cpu", dtype="float32", num_threads=3, deterministic=False,
        kv_cache_memory="1GiB",
    )  # fmt: skip
    assert [settings for _, _, settings in bundles] == [expected, expected]
    assert [file for file, _, _ in bundles] == [path, path]
    assert (circumstances, as_json) == (Circumstances(), False)


def test_circumstances_are_flags(path: Path, seen: list[tuple[Any, ...]]) -> None:
    invoke(
        str(path), "--model", "./here", "--times", "3", "--company", "5", "--no-cache", "--ignore-fingerprint", "--json"
    )
    ((((_, _, settings),), circumstances, as_json),) = seen
    assert settings.model == "./here"
    assert circumstances == Circumstances(times=3, use_cache=False, company=5, ignore_fingerprint=True)
    assert as_json


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'BUNDLE...'"),
        (["--times", "0", "x"], "--times"),
        (["--company", "-1", "x"], "--company"),
        (["--num-thread", "1", "x"], "'--num-threads'"),
        (["--port", "1", "x"], "No such option"),
    ],
)
def test_bad_usage_ends_with_code_2(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_bad_bundle_ends_with_code_2_before_anything_is_loaded(path: Path, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"format": 2}')
    found = subprocess.run(
        [sys.executable, "-m", "reprise.cli", "replay", str(path), str(tmp_path / "b.json")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (found.returncode, found.stdout) == (2, "")
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"reprise: {tmp_path / 'b.json'} is not a bundle of format 2: ")


def test_what_a_bundle_is_refused_for_is_no_terminals_command(tmp_path: Path) -> None:
    document = json.loads(encode(bundle())) | {"\x1b]0;x\x07": 1}
    (tmp_path / "b.json").write_text(json.dumps(document))
    found = subprocess.run(
        [sys.executable, "-m", "reprise.cli", "replay", str(tmp_path / "b.json")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 2
    assert "unknown field `\\x1b]0;x\\x07`" in found.stderr


def test_bad_settings_are_told_as_those_of_a_server_are(path: Path) -> None:
    assert isinstance(invoke(str(path), "--dtype", "fp16").exception, ConfigError)
    assert isinstance(invoke(str(path.with_name("none.json"))).exception, BundleError)


def test_help_tells_every_exit_code_and_no_variables() -> None:
    text = " ".join(invoke("--help").output.split())
    for code in (0, 1, 2, 3):
        assert f"{code} " in text.partition("Exit codes:")[2]
    assert "REPRISE_" not in text
    for name in EngineConfig.__struct_fields__:
        assert f"--{name.replace('_', '-')}" in text


def test_the_number_of_runs_is_told(path: Path) -> None:
    from reprise.replay.report import Report

    report = Report(
        id="cmpl-1",
        identical=True,
        same_fingerprint=True,
        changes=[],
        expected_error=None,
        found_error=None,
        choices=[],
    )
    different = msgspec.structs.replace(report, identical=False)
    assert text_of(Replayed(str(path), 1, report)) == "cmpl-1: identical"
    assert text_of(Replayed(str(path), 5, report)) == "cmpl-1: identical in each of 5 runs"
    assert text_of(Replayed(str(path), 2, different)) == "cmpl-1: DIFFERENT in run 2"
