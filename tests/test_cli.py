"""The command line as a user meets it; `reprise serve` itself is met in tests/clients and tests/ops."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

import reprise
from reprise.cli import cli
from reprise.config import load_settings
from reprise.errors import ConfigError
from reprise.exit_code import ExitCode
from reprise.settings import Settings, environment_name

COMMAND = [sys.executable, "-m", "reprise.cli"]


def invoke(*arguments: str, environ: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="reprise", env=environ, terminal_width=110)


def run(*arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    package_root = str(Path(reprise.__file__).parents[1])
    variables = {"PYTHONPATH": package_root, "PATH": "/usr/bin:/bin"} | (environ or {})
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=variables, timeout=60, check=False
    )


def test_version() -> None:
    assert invoke("--version").output == f"reprise {reprise.__version__}\n"


def test_help_shows_every_flag_with_variable_default_and_heading() -> None:
    result = invoke("serve", "--help")
    text = " ".join(result.output.split())
    assert result.exit_code == 0
    for name in Settings.model_fields:
        if name != "model":
            assert f"--{name.replace('_', '-')}" in text
            assert f"env: {environment_name(name)}" in text
    headings = [line for line in result.output.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["General:", "Model:", "Engine:", "HTTP:", "Limits:", "Logging:"]
    assert "--port PORT" in text
    assert "default: 8000" in text
    assert "--device auto|cpu|cuda" in text
    assert max(len(line) for line in result.output.splitlines()) <= 110


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "fastapi", "uvicorn", "numpy", "rich"]
    script = (
        "import sys\nfrom reprise.cli import main\nsys.argv = ['reprise', 'serve', '--help']\n"
        f"try: main()\nfinally: print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    package_root = str(Path(reprise.__file__).parents[1])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": package_root},
        timeout=60,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stderr.strip() == "[]"
    # Computing time, since a busy machine makes everything wait: 0.2 s where this was written.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--prot", "1"], "'--port'"),
        (["serve", "--max-model-length", "1"], "'--max-model-len'"),
        (["serve", "--model", "x"], "the argument: reprise serve MODEL"),
        (["serv"], "Did you mean 'serve'?"),
        (["serve", "a", "b"], "unexpected extra argument"),
    ],
)
def test_a_mistyped_command_gets_the_nearest_right_one(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_mistyped_flag_gets_the_nearest_alone() -> None:
    assert "--host" not in invoke("serve", "--prot", "1").output


def test_help_tells_every_exit_code() -> None:
    text = " ".join(invoke("serve", "--help").output.split())
    for code in ExitCode:
        assert re.search(rf"\b{code.value} [a-z]", text.partition("Exit codes:")[2])
    assert "1 the engine was lost, or a shutdown had to cut requests off after drain_timeout" in text


def test_the_text_of_a_template_file_reaches_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Settings, str | None]] = []

    def run(settings: Settings, *, chat_template: str | None) -> int:
        seen.append((settings, chat_template))
        return ExitCode.OK

    monkeypatch.setattr("reprise.serve.run", run)
    monkeypatch.setattr("reprise.cli.start_fork_server", lambda: None)
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}")
    assert invoke("serve", "--chat-template", str(file)).exit_code == 0
    assert seen == [(Settings(chat_template=file), "{{ messages }}")]


def test_bad_settings_end_with_code_2_and_every_problem() -> None:
    result = run("serve", "--port", "x", environ={"REPRISE_DTYPE": "fp16"})
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "reprise: 2 problems in the settings:",
        "  REPRISE_DTYPE: 'fp16' is not one of auto, float32, bfloat16, float16",
        "  --port: 'x' is not a whole number from 1 to 65535",
    ]


def test_config_shows_values_with_their_sources_and_hides_keys(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("block_size: 8\n")
    result = invoke(
        "config", "some/model", "--no-metrics", "--api-key", "sk-1", "--served-model-name", "a",
        "--served-model-name", "b", "--config", str(file), environ={"REPRISE_PORT": "81"},
    )  # fmt: skip
    lines = result.output.splitlines()
    assert 'model: "some/model"  # MODEL' in lines
    assert "metrics: false  # --metrics" in lines
    assert 'served_model_name: ["a", "b"]  # --served-model-name' in lines
    assert f"block_size: 8  # {file}:1" in lines
    assert "port: 81  # REPRISE_PORT" in lines
    assert "max_num_seqs: 64  # default" in lines
    assert "sk-1" not in result.output
    assert list(yaml.safe_load(result.output)) == list(Settings.model_fields)


def test_what_config_shows_can_be_used_as_a_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "shown.yaml"
    file.write_text(invoke("config", "--kv-cache-memory", "1GiB", "--host", "::1").output)
    assert load_settings({}, {}, file) == Settings(kv_cache_memory="1GiB", host="::1")


def test_the_configuration_file_can_be_named_by_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("port: 82\n")
    assert f"port: 82  # {file}:1" in invoke("config", environ={"REPRISE_CONFIG": str(file)}).output


def test_both_spellings_of_a_switch() -> None:
    assert "prefix_cache: true  # --prefix-cache" in invoke("config", "--prefix-cache").output
    assert "prefix_cache: false  # --prefix-cache" in invoke("config", "--no-prefix-cache").output


def test_a_problem_reaches_the_caller_as_config_error() -> None:
    assert isinstance(invoke("serve", "--port", "0").exception, ConfigError)


@pytest.mark.parametrize("local", [True, False])
def test_the_fork_server_begins_before_all_else_where_no_hub_has_to_be_asked(
    local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def run(*_: object, **__: object) -> int:
        order.append("run")
        return ExitCode.OK

    monkeypatch.setattr("reprise.cli.start_fork_server", lambda: order.append("fork server"))
    monkeypatch.setattr("reprise.serve.run", run)
    assert invoke("serve", str(tmp_path) if local else "org/name").exit_code == ExitCode.OK
    assert order == ["fork server", "run"] if local else ["run"]
