"""Compiles the kernels for CPUs as recclr is installed, where there is a compiler.

Without one recclr runs on PyTorch alone, at a third of the speed, and says so (``recclr check``,
``environment.json`` of a run). ``python hatch_build.py`` compiles them again in a checkout.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # as a script, in an environment without the build backend
    BuildHookInterface = object

FOLDER = Path(__file__).parent / "recclr" / "cpp"
# What PyTorch calls the instruction sets that it chooses by, and how a compiler is told of them.
INSTRUCTION_SETS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma",
}
# Errno and traps keep loops with a square root from becoming vectors. No -ffast-math: infinities
# and NaN have their meaning.
FLAGS = "-c -O3 -std=c++17 -fPIC -fopenmp -fno-math-errno -fno-trapping-math -Wall -Wno-psabi"


class KernelsHook(BuildHookInterface):  # type: ignore[misc, valid-type]
    """Puts the compiled libraries beside their sources, and into wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        try:
            built = compile_kernels(FOLDER)
        except RuntimeError as error:
            self.app.display_warning(
                f"recclr goes without its kernels for CPUs: {error}\n"
                "Once that is mended, install with --no-cache-dir: pip keeps what it has built."
            )
            return
        build_data["artifacts"] += [f"/recclr/cpp/{path.name}" for path in built]
        build_data["pure_python"], build_data["infer_tag"] = False, True


def compile_kernels(folder: Path) -> list[Path]:
    """Compile one library for each instruction set, in place of what is there.

    Raises:
        RuntimeError: there is no compiler, it fails, or none is written for this kind of machine.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise RuntimeError(f"there are none for {sys.platform} on {platform.machine()}")
    found = os.environ.get("CXX") or shutil.which("g++")
    if not found:
        raise RuntimeError("there is no g++, and CXX names no other compiler")
    try:
        compiler = shlex.split(found)
    except ValueError as error:
        raise RuntimeError(f"CXX={found}: {error}") from error
    return [_compile(compiler, folder, name) for name in INSTRUCTION_SETS]


def _compile(compiler: list[str], folder: Path, name: str) -> Path:
    target = folder / f"kernels-{name}.so"
    # Renamed into place: a process that has the old one mapped keeps it, and none sees half of it.
    handle, fresh_name = tempfile.mkstemp(prefix=f".{target.name}.", dir=folder.resolve())
    os.close(handle)
    fresh = Path(fresh_name)
    options = [*FLAGS.split(), *INSTRUCTION_SETS[name].split()]
    options.append(f'-DRECCLR_SOURCES="{fingerprint(folder)}"')
    sources = sorted(str(path.resolve()) for path in folder.glob("*.cpp"))
    try:
        with tempfile.TemporaryDirectory() as objects:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                # A list, so that what fails is raised.
                list(pool.map(lambda one: _run([*compiler, *options, one], objects), sources))
            # Linked without OpenMP: the threads shall be PyTorch's own, of the library that it has
            # loaded by then. Two pools would wait for each other's cores.
            parts = sorted(str(path) for path in Path(objects).glob("*.o"))
            _run([*compiler, "-shared", "-o", str(fresh), *parts], objects)
        if b"__kmpc_" in fresh.read_bytes():
            raise RuntimeError(f"{compiler[0]} asks for another OpenMP than PyTorch's; take g++")
        fresh.chmod(0o755)
        fresh.replace(target)
    except OSError as error:
        raise RuntimeError(f"{compiler[0]}: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)
    return target


def _run(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")


def fingerprint(folder: Path) -> str:
    """Of the sources; the libraries repeat it, so that ``kernels.native`` knows a stale one."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    print(*compile_kernels(FOLDER), sep="\n")
