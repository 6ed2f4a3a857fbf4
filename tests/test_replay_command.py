"""`reprise replay` with an engine of a script; tests/e2e/test_replay.py loads a model."""

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
from reprise.errors import BundleError, ConfigError, GenerationError
from reprise.generation.supervision import HangLimits
from reprise.ipc.messages import EngineConfig
from reprise.replay.bundle import Bundle, Choice, Generation, encode
from reprise.replay_command import Circumstances, Replayed, ReplayExitCode, run, text_of
from reprise.settings import Settings
from reprise.text.tokenizer import Tokenizer
from reprise.types import ChoiceDelta, FinishReason, GenerationRequest, SamplingParams
from support.bundles import bundle
from support.scripted_engine import Item, ScriptedEngine
from support.tiny_tokenizers import add_start_token, byte_level, save_model


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


class Loading:
    """Stands for the loading of models: the scripts of their engines' requests, and with what they were started."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.scripts: list[list[Item]] = []
        self.limits: list[HangLimits | None] = []

    def engine(self, _config: EngineConfig, tokenizer: Tokenizer, **options: Any) -> ScriptedEngine:
        self.limits.append(options.get("limits"))
        engine = ScriptedEngine(tokenizer)
        for script in self.scripts:
            engine.enqueue(script)
        return engine


@pytest.fixture
def loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loading:
    tokenizer = Tokenizer.load(str(save_model(tmp_path / "model", add_start_token(byte_level()))))
    made = Loading(tokenizer)
    monkeypatch.setattr("reprise.replay_command.AsyncEngine", made.engine)
    monkeypatch.setattr("reprise.replay_command.load_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr("reprise.replay_command.reach_hub", lambda *_: None)
    return made


def generation(*token_ids: int, temperature: float = 1.0) -> Generation:
    """One choice of these tokens."""
    sampling = SamplingParams(seed=1, max_tokens=len(token_ids), temperature=temperature)
    request = GenerationRequest(request_id="cmpl-1-0", prompt_token_ids=[5, 6], sampling=sampling)
    return Generation(request=request, choices=[Choice(token_ids=list(token_ids), text="", finish_reason="length")])


def given(*generations: Generation, settings: Settings | None = None) -> list[tuple[Path, Bundle, Settings]]:
    """Bundles of a generation each: a.json, b.json and so on."""
    settings = settings or Settings(model="pocket")
    names = (f"{letter}.json" for letter in "abcdef")
    return [
        (Path(name), bundle(id=f"cmpl-{name[0]}", generations=[each]), settings)
        for name, each in zip(names, generations, strict=False)
    ]


def answer(*token_ids: int) -> list[Item]:
    """The script of a request that is answered with these tokens."""
    return [ChoiceDelta(index=0, token_ids=list(token_ids), finish_reason=FinishReason.LENGTH)]


def test_a_bundle_that_cannot_be_run_keeps_no_other_from_it(
    loading: Loading, capfd: pytest.CaptureFixture[str]
) -> None:
    loading.scripts = [answer(1, 2), answer(1, 3), answer(1, 2)]
    refused = generation(1, 2, temperature=-1.0)
    code = run(given(generation(1, 2), refused, generation(1, 2), generation(1, 2)), Circumstances())
    output = capfd.readouterr()
    told = [line for line in output.out.splitlines() if line.startswith("cmpl-")]
    assert told == ["cmpl-a: identical", "cmpl-c: DIFFERENT", "cmpl-d: identical"]
    assert "cannot replay b.json: generations[0].request of the bundle cannot be run here: " in output.err
    assert code == ReplayExitCode.BUNDLE


@pytest.mark.parametrize("code", ["capacity", "incomplete", "cancelled", "request_timeout"])
def test_what_befalls_a_replay_is_no_difference(loading: Loading, capfd: pytest.CaptureFixture[str], code: str) -> None:
    loading.scripts = [[GenerationError("there is no room", code=code)], answer(1, 2)]
    exit_code = run(given(generation(1, 2), generation(1, 2)), Circumstances())
    output = capfd.readouterr()
    assert [line for line in output.out.splitlines() if line.startswith("cmpl-")] == ["cmpl-b: identical"]
    assert f"cannot replay a.json: there is no room ({code})" in output.err
    assert exit_code == ReplayExitCode.BUNDLE


def test_an_error_of_the_request_itself_is_a_difference(loading: Loading, capfd: pytest.CaptureFixture[str]) -> None:
    loading.scripts = [[GenerationError("broken", code="numerical_error")]]
    assert run(given(generation(1, 2)), Circumstances()) == ReplayExitCode.DIFFERENT
    assert "cmpl-a: DIFFERENT" in capfd.readouterr().out


def test_an_engine_that_hangs_is_replaced_as_a_servers_is(loading: Loading) -> None:
    settings = Settings(model="pocket", heartbeat_timeout=3, step_timeout=900, load_timeout=60)
    loading.scripts = [answer(1, 2)]
    assert run(given(generation(1, 2), settings=settings), Circumstances()) == ReplayExitCode.IDENTICAL
    assert loading.limits == [HangLimits(3, 900, 60)]


def test_hang_limits_are_flags(path: Path, seen: list[tuple[Any, ...]]) -> None:
    invoke(str(path), "--heartbeat-timeout", "3", "--step-timeout", "900", "--load-timeout", "60")
    ((((_, _, settings),), _, _),) = seen
    assert (settings.heartbeat_timeout, settings.step_timeout, settings.load_timeout) == (3, 900, 60)


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
