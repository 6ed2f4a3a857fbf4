"""Dockerfile and compose file, as far as they can be judged where no Docker engine runs."""

from __future__ import annotations

import fnmatch
import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from reprise.cli import cli
from reprise.config import load_settings
from reprise.notices import startup_notices
from reprise.settings import Settings, environment_name

ROOT = Path(__file__).parents[2]
SETTING_VARIABLES = {environment_name(name) for name in Settings.model_fields} | {"REPRISE_CONFIG"}


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def last(instructions: list[tuple[str, str]], name: str) -> str:
    return [arguments for instruction, arguments in instructions if instruction == name][-1]


def environment(instructions: list[tuple[str, str]]) -> dict[str, str]:
    words = shlex.split(last(instructions, "ENV"))
    return dict(word.split("=", 1) for word in words)


def is_ignored(path: str) -> bool:
    ignored = False
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(path, pattern.removeprefix("!")):
            ignored = not pattern.startswith("!")
    return ignored


def test_what_is_copied_exists_and_is_sent_to_the_builder(instructions: list[tuple[str, str]]) -> None:
    copied = [
        source
        for name, arguments in instructions
        if name == "COPY" and "--from" not in arguments
        for source in arguments.split()[:-1]
    ]
    assert {"constraints.txt", "pyproject.toml", "server"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not is_ignored(source), source
    assert is_ignored("tests")
    assert is_ignored(".venv")


def test_the_package_is_built_from_what_is_copied(instructions: list[tuple[str, str]]) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    copied = " ".join(arguments for name, arguments in instructions if name == "COPY")
    for file in re.findall(r'^(?:readme = |license-files = \[)"([^"]+)"', project, re.MULTILINE):
        assert file in copied


def test_the_torch_of_either_build_is_the_pinned_one(instructions: list[tuple[str, str]]) -> None:
    (install,) = [text for name, text in instructions if name == "RUN" and "torch==" in text]
    assert "s/^torch==//p" in install
    assert '"torch==$version+cpu"' in install
    assert "https://download.pytorch.org/whl/cpu" in install
    assert re.search(r"^torch==[0-9.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert ("ARG", "TORCH=cpu") in instructions


def test_the_server_runs_as_a_user_with_an_entry_and_ends_on_sigterm(instructions: list[tuple[str, str]]) -> None:
    user = last(instructions, "USER")
    assert user not in ("root", "0")
    commands = [command.split() for name, text in instructions if name == "RUN" for command in text.split("&&")]
    assert [command[-1] for command in commands if command[0] == "useradd"] == [user]
    assert last(instructions, "STOPSIGNAL") == "SIGTERM"


def test_the_entry_point_is_a_command_of_ours(instructions: list[tuple[str, str]]) -> None:
    entry_point = json.loads(last(instructions, "ENTRYPOINT"))
    assert entry_point[:-1] == ["tini", "--"]
    assert entry_point[-1] == "reprise"
    result = CliRunner().invoke(cli, [*json.loads(last(instructions, "CMD")), "--help"])
    assert result.exit_code == 0


def test_the_image_sets_only_settings_and_listens_on_all_addresses(instructions: list[tuple[str, str]]) -> None:
    variables = environment(instructions)
    assert {name for name in variables if name.startswith("REPRISE_")} <= SETTING_VARIABLES
    assert load_settings({}, variables, None).host == "0.0.0.0"  # noqa: S104 # inside a container
    assert variables["HF_HOME"] == last(instructions, "VOLUME")
    assert int(last(instructions, "EXPOSE")) == Settings().port


def test_the_health_check_asks_whether_the_server_is_alive(instructions: list[tuple[str, str]]) -> None:
    command = json.loads(last(instructions, "HEALTHCHECK").split("CMD", 1)[1])
    assert command[:2] == ["python", "-c"]
    assert "/health" in command[2]
    compile(command[2], "HEALTHCHECK", "exec")


@pytest.mark.parametrize("name", ["reprise", "reprise-gpu"])
class TestService:
    def test_is_locked_down(self, compose: dict[str, Any], name: str) -> None:
        service = compose["services"][name]
        assert service["read_only"] is True
        assert service["tmpfs"] == ["/tmp"]  # noqa: S108 # a tmpfs inside of the container
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]

    def test_is_published_on_this_machine_only(self, compose: dict[str, Any], name: str) -> None:
        (port,) = compose["services"][name]["ports"]
        assert port == "127.0.0.1:${PORT:-8000}:8000"

    def test_starting_it_as_it_is_warns_of_nothing(
        self, compose: dict[str, Any], instructions: list[tuple[str, str]], name: str
    ) -> None:
        variables = environment(instructions) | compose["services"][name]["environment"]
        file = ROOT / variables.pop("REPRISE_CONFIG").replace("/etc/reprise", "configs")
        settings = load_settings({}, variables | {"REPRISE_API_KEY": ""}, file)
        (notice,) = startup_notices(settings, in_container=True)
        assert notice.level == logging.INFO

    def test_its_settings_load_and_leave_time_to_drain(self, compose: dict[str, Any], name: str) -> None:
        service = compose["services"][name]
        variables = {key: "" if "$" in value else value for key, value in service["environment"].items()}
        assert {key for key in variables if key.startswith("REPRISE_")} <= SETTING_VARIABLES
        file = ROOT / variables.pop("REPRISE_CONFIG").replace("/etc/reprise", "configs")
        settings = load_settings({}, variables, file)
        assert settings.public_metrics
        assert int(service["stop_grace_period"].removesuffix("s")) > settings.drain_timeout

    def test_its_command_is_one_of_ours(self, compose: dict[str, Any], name: str) -> None:
        command, model = compose["services"][name]["command"]
        assert command == "serve"
        assert model == "${MODEL:-pocket}"

    def test_its_health_check_is_a_program(self, compose: dict[str, Any], name: str) -> None:
        kind, interpreter, option, program = compose["services"][name]["healthcheck"]["test"]
        assert (kind, interpreter, option) == ("CMD", "python", "-c")
        compile(program, "healthcheck", "exec")

    def test_is_built_for_its_device(self, compose: dict[str, Any], name: str) -> None:
        service = compose["services"][name]
        expected = {"reprise": "cpu", "reprise-gpu": "cuda"}[name]
        assert service["build"]["args"] == {"TORCH": expected}
        assert service["image"] == f"reprise:{expected}"


def test_paths_and_volumes_of_the_compose_file_exist(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source
            else:
                assert source in compose["volumes"]


def test_only_the_server_starts_without_a_profile(compose: dict[str, Any]) -> None:
    profiles = {name: service.get("profiles") for name, service in compose["services"].items()}
    assert profiles == {"reprise": None, "reprise-gpu": ["gpu"], "prometheus": ["monitoring"]}


def test_the_gpu_is_reserved(compose: dict[str, Any]) -> None:
    reserved = compose["services"]["reprise-gpu"]["deploy"]["resources"]["reservations"]
    assert reserved == {"devices": [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]}


def test_prometheus_looks_for_a_name_that_both_servers_have(compose: dict[str, Any]) -> None:
    configuration = yaml.safe_load((ROOT / "configs/prometheus.yml").read_text())
    (job,) = configuration["scrape_configs"]
    ((host, port),) = [target.split(":") for target in job["static_configs"][0]["targets"]]
    assert job["metrics_path"] == "/metrics"
    assert int(port) == Settings().port
    assert host in compose["services"]
    assert host in compose["services"]["reprise-gpu"]["networks"]["default"]["aliases"]
