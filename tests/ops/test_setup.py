"""`scripts/setup` decides by what it finds; here it finds a machine of stand-ins: nothing is downloaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("sh", "dirname", "sed", "grep", "mkdir", "cp", "cat", "rm", "env", "ls", "touch")

PYTHON = """#!/bin/sh
case "$*" in
*"version_info < (3, 11)"*) [ ! -e "$STATE/old-python" ] ;;
*"import ensurepip"*) [ ! -e "$STATE/no-venv-module" ] ;;
*"%d.%d-venv"*) echo python3.11-venv ;;
--version) echo Python 3.11.2 ;;
"-m venv"*)
    echo "$*" >>"$STATE/venv.log"
    mkdir -p "$4/bin" && touch "$4/pyvenv.cfg"
    for tool in python pip; do cp "$STATE/venv-$tool" "$4/bin/$tool"; done ;;
*) exit 99 ;;
esac
"""
VENV_PYTHON = """#!/bin/sh
case "$*" in
"-m pip --version") [ ! -e "$STATE/no-pip" ] ;;
*"version_info < (3, 11)"*) [ ! -e "$STATE/old-environment" ] ;;
*"import ensurepip"*) [ ! -e "$STATE/no-venv-module" ] ;;
*"%d.%d-venv"*) echo python3.11-venv ;;
"-m ensurepip --upgrade --default-pip") [ ! -e "$STATE/no-ensurepip" ] && rm "$STATE/no-pip" ;;
*importlib.metadata*) cat "$STATE/torch" 2>/dev/null ;;
*) exec "$REAL_PYTHON" "$@" ;;
esac
"""
VENV_PIP = """#!/bin/sh
echo "$*" >>"$STATE/pip.log"
case "$*" in
*--no-index*) [ -e "$STATE/wheelhouse" ] && echo 2.13.0+cpu >"$STATE/torch" ;;
*whl/cpu*) [ ! -e "$STATE/no-network" ] && echo 2.13.0+cpu >"$STATE/torch" ;;
install\\ torch*) echo 2.13.0 >"$STATE/torch" ;;
esac
"""
APT_GET = """#!/bin/sh
echo "$*" >>"$STATE/apt.log"
case "$*" in install*) rm "$STATE/no-venv-module" ;; esac
"""


@dataclass
class Machine:
    """A checkout and a PATH on which every tool that matters is a stand-in."""

    root: Path

    @property
    def state(self) -> Path:
        return self.root / "state"

    def has(self, *facts: str) -> None:
        for fact in facts:
            (self.state / fact).touch()

    def command(self, name: str, script: str) -> None:
        path = self.root / "bin" / name
        path.write_text(script)
        path.chmod(0o755)

    def setup(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": str(self.root / "bin"), "STATE": str(self.state), "REAL_PYTHON": sys.executable}
        return subprocess.run(
            [str(self.root / "checkout/scripts/setup"), *arguments],
            env=variables | environ,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def log(self, name: str) -> list[str]:
        path = self.state / f"{name}.log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    checkout = tmp_path / "checkout"
    for directory in (checkout / "scripts", tmp_path / "bin", tmp_path / "state"):
        directory.mkdir(parents=True)
    shutil.copy(ROOT / "scripts/setup", checkout / "scripts/setup")
    shutil.copy(ROOT / "constraints.txt", checkout / "constraints.txt")
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    machine = Machine(tmp_path)
    machine.command("python3", PYTHON)
    machine.command("uname", "#!/bin/sh\necho Linux\n")
    machine.command("id", "#!/bin/sh\necho 1000\n")
    for name, script in (("venv-python", VENV_PYTHON), ("venv-pip", VENV_PIP)):
        (machine.state / name).write_text(script)
        (machine.state / name).chmod(0o755)
    return machine


CPU_LOCAL = "install -q --no-deps --no-index torch==2.13.0+cpu"
CPU_INDEX = "install -q --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu"
CUDA = "install torch==2.13.0"
REPRISE = "install -q -e . -c .venv/constraints.txt"


def test_without_a_gpu_torch_is_the_build_without_cuda(machine: Machine) -> None:
    result = machine.setup("serve")
    assert result.returncode == 0, result.stderr
    assert machine.log("pip") == [CPU_LOCAL, CPU_INDEX, REPRISE]
    assert "torch 2.13.0+cpu, ready" in result.stdout


def test_wheels_at_hand_spare_the_download(machine: Machine) -> None:
    machine.has("wheelhouse")
    assert machine.setup("serve").returncode == 0
    assert machine.log("pip") == [CPU_LOCAL, REPRISE]


def test_with_a_gpu_torch_is_the_build_with_cuda(machine: Machine) -> None:
    machine.command("nvidia-smi", "#!/bin/sh\necho GPU 0\n")
    assert machine.setup("serve").returncode == 0
    assert machine.log("pip") == [CUDA, REPRISE]


def test_a_driver_tool_without_a_gpu_is_no_gpu(machine: Machine) -> None:
    machine.command("nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert machine.setup("serve").returncode == 0
    assert CUDA not in machine.log("pip")


@pytest.mark.parametrize(("choice", "expected"), [("cuda", CUDA), ("cpu", CPU_LOCAL)])
def test_the_build_can_be_chosen(machine: Machine, choice: str, expected: str) -> None:
    machine.has("wheelhouse")
    if choice == "cpu":
        machine.command("nvidia-smi", "#!/bin/sh\necho GPU 0\n")
    assert machine.setup("serve", REPRISE_TORCH=choice).returncode == 0
    assert machine.log("pip") == [expected, REPRISE]


def test_a_choice_that_is_none_is_refused(machine: Machine) -> None:
    result = machine.setup("serve", REPRISE_TORCH="rocm")
    assert result.returncode == 1
    assert "REPRISE_TORCH is 'rocm'; it is cpu or cuda" in result.stderr


def test_a_supported_torch_stays_and_is_what_the_rest_is_resolved_against(machine: Machine) -> None:
    (machine.state / "torch").write_text("2.11.1\n")
    assert machine.setup("serve").returncode == 0
    assert machine.log("pip") == [REPRISE]
    constraints = (machine.root / "checkout/.venv/constraints.txt").read_text().splitlines()
    assert constraints[0] == "torch==2.11.1"
    assert len([line for line in constraints if line.startswith("torch==")]) == 1
    assert any(line.startswith("transformers==") for line in constraints)


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0"])
def test_a_torch_that_is_too_old_is_replaced(machine: Machine, version: str) -> None:
    (machine.state / "torch").write_text(f"{version}\n")
    machine.has("wheelhouse")
    assert machine.setup("serve").returncode == 0
    assert machine.log("pip") == [CPU_LOCAL, REPRISE]


def test_the_other_build_is_replaced_only_where_that_is_asked_for(machine: Machine) -> None:
    machine.command("nvidia-smi", "#!/bin/sh\necho GPU 0\n")
    (machine.state / "torch").write_text("2.13.0+cpu\n")
    result = machine.setup("serve")
    assert "REPRISE_TORCH=cuda installs the build that can use it" in result.stdout
    assert machine.log("pip") == [REPRISE]
    assert machine.setup("serve", REPRISE_TORCH="cuda").returncode == 0
    assert machine.log("pip")[1:] == ["uninstall -q -y torch", CUDA, REPRISE]


def test_without_a_network_it_says_what_failed(machine: Machine) -> None:
    machine.has("no-network")
    result = machine.setup("serve")
    assert result.returncode == 1
    assert "torch without CUDA could not be installed" in result.stderr


def test_a_missing_venv_module_is_installed_by_root(machine: Machine) -> None:
    machine.has("no-venv-module")
    machine.command("id", "#!/bin/sh\necho 0\n")
    machine.command("apt-get", APT_GET)
    result = machine.setup("serve")
    assert result.returncode == 0, result.stderr
    assert machine.log("apt") == [
        "update -qq",
        "install -y --no-install-recommends python3.11-venv -qq",
    ]


def test_a_missing_venv_module_is_installed_with_sudo_where_it_asks_for_no_password(machine: Machine) -> None:
    machine.has("no-venv-module")
    machine.command("apt-get", APT_GET)
    machine.command("sudo", '#!/bin/sh\nshift\necho "sudo $*" >>"$STATE/sudo.log"\nexec env "$@"\n')
    machine.command("true", "#!/bin/sh\n")
    assert machine.setup("serve").returncode == 0
    assert machine.log("sudo")[1:] == [
        "sudo apt-get update -qq",
        "sudo apt-get install -y --no-install-recommends python3.11-venv -qq",
    ]


def test_a_missing_venv_module_otherwise_gets_one_command_to_run(machine: Machine) -> None:
    machine.has("no-venv-module")
    machine.command("apt-get", APT_GET)
    result = machine.setup("serve")
    assert result.returncode == 1
    assert "  sudo apt-get install -y --no-install-recommends python3.11-venv" in result.stderr
    assert machine.log("apt") == []
    assert machine.log("pip") == []


def test_an_old_python_is_refused_with_what_to_do(machine: Machine) -> None:
    machine.has("old-python")
    result = machine.setup("serve")
    assert result.returncode == 1
    assert "no Python of version 3.11 or newer" in result.stderr


def test_another_set_of_extras_in_an_environment_that_is_there(machine: Machine) -> None:
    machine.has("wheelhouse")
    assert machine.setup("serve").returncode == 0
    assert machine.setup("test").returncode == 0
    assert machine.log("pip")[2:] == ["install -q -e .[test] -e clients/python -c .venv/constraints.txt"]


@pytest.mark.parametrize("venv", [".venv", ".", "../home"])
def test_a_directory_that_is_no_environment_is_left_alone(machine: Machine, venv: str) -> None:
    """`venv --clear` would remove all that is in it."""
    directory = machine.root / "checkout" / venv
    directory.mkdir(exist_ok=True)
    (directory / "thesis.txt").write_text("all that I have")
    result = machine.setup("serve", VENV=venv)
    assert result.returncode == 1
    assert f"setup: {venv} is no virtual environment, and not empty" in result.stderr
    assert (directory / "thesis.txt").exists()
    assert machine.log("venv") == []


def test_an_environment_without_pip_keeps_what_it_has(machine: Machine) -> None:
    """As other tools make them."""
    assert machine.setup("serve").returncode == 0
    machine.has("no-pip")
    (machine.root / "checkout/.venv/other").touch()
    result = machine.setup("serve")
    assert result.returncode == 0
    assert "pip in .venv, which had none" in result.stdout
    assert (machine.root / "checkout/.venv/other").exists()
    assert len(machine.log("venv")) == 1


def test_an_environment_without_pip_gets_what_its_python_lacks(machine: Machine) -> None:
    """As `python3 -m venv` leaves one where Debian's package of it is missing."""
    assert machine.setup("serve").returncode == 0
    machine.has("no-pip", "no-venv-module")
    machine.command("apt-get", APT_GET)
    machine.command("id", "#!/bin/sh\necho 0\n")
    assert machine.setup("serve").returncode == 0
    assert any("python3.11-venv" in line for line in machine.log("apt"))
    assert len(machine.log("venv")) == 1


def test_an_environment_of_an_older_python_is_made_anew(machine: Machine) -> None:
    assert machine.setup("serve").returncode == 0
    machine.has("no-pip", "old-environment")
    machine.setup("serve")
    assert len(machine.log("venv")) == 2


def test_an_environment_that_cannot_have_pip_is_left_alone(machine: Machine) -> None:
    assert machine.setup("serve").returncode == 0
    machine.has("no-pip", "no-ensurepip")
    result = machine.setup("serve")
    assert (result.returncode, len(machine.log("venv"))) == (1, 1)
    assert "the environment .venv has no pip: install pip in it, or remove it" in result.stderr


def test_a_broken_environment_is_made_anew(machine: Machine) -> None:
    assert machine.setup("serve").returncode == 0
    (machine.root / "checkout/.venv/bin/python").unlink()
    assert machine.setup("serve").returncode == 0
    assert machine.log("venv") == ["-m venv --clear .venv"] * 2


def test_an_empty_directory_becomes_an_environment(machine: Machine) -> None:
    (machine.root / "checkout/.venv").mkdir()
    assert machine.setup("serve").returncode == 0


def test_an_unknown_set_of_extras_is_refused_before_anything_is_made(machine: Machine) -> None:
    result = machine.setup("all")
    assert result.returncode == 1
    assert "usage: scripts/setup serve|test|lint" in result.stderr
    assert not (machine.root / "checkout/.venv").exists()
