"""Compile the native decoder while Reprise is installed. Without a compiler it is left out: torch computes all then."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path(__file__).parent / "server" / "reprise" / "engine" / "native"
COMMON = ["-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512bf16",
    "-mavx512vnni",
    "-mprefer-vector-width=512",
]
AMX = ["-mamx-tile", "-mamx-bf16"]
X86_64 = {"amx": AVX2 + AVX512 + AMX, "avx512bf16": AVX2 + AVX512, "avx2": AVX2}


def sources_digest(directory: Path) -> int:
    """As `reprise.engine.native.library` has it, which cannot be imported here."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*directory.glob("*.cpp"), *directory.glob("*.h")]):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "big")


class NativeDecoder(BuildHookInterface[Any]):
    """One shared library for each instruction set, loaded by its name at run time."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 # hatchling's signature
        compiler = next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "c++", "g++", "clang++"])), None)
        if compiler is None:
            self.app.display_warning("no C++ compiler: the native decoder is left out, models run through torch alone")
            return
        for stale in NATIVE.glob("decoder-*.so"):
            stale.unlink()
        command = [compiler, *COMMON, f"-DREPRISE_SOURCES={sources_digest(NATIVE):#x}ull"]
        command += map(str, sorted(NATIVE.glob("*.cpp")))
        variants = X86_64 if platform.machine() in ("x86_64", "AMD64") else {"generic": []}
        libraries = {name: NATIVE / f"decoder-{name}.so" for name in variants}
        compilations = {
            name: subprocess.Popen(  # noqa: S603 # our own command
                [*command, *flags, "-o", str(libraries[name])], stderr=subprocess.PIPE, text=True
            )
            for name, flags in variants.items()
        }
        for name, compilation in compilations.items():
            complaints = compilation.communicate()[1]
            if compilation.returncode:
                self.app.display_warning(f"the native decoder cannot be compiled for {name}: {complaints[:500]}")
            else:
                build_data["artifacts"].append(str(libraries[name].relative_to(Path(self.root))))
                build_data["pure_python"] = False
        if not build_data.get("pure_python", True):
            build_data["tag"] = f"py3-none-{_platform_tag()}"


def _platform_tag() -> str:
    from packaging.tags import platform_tags

    return next(iter(platform_tags()))
