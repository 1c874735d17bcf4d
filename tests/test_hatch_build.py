"""Kernels are compiled as recclr is installed; where they cannot be, it is installed without."""

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recclr.kernels import native

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not (ROOT / "hatch_build.py").is_file(), reason="not in a checkout of the project"
)


@pytest.fixture
def build():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "cpp"
    folder.mkdir()
    for path in [*native.FOLDER.glob("*.cpp"), *native.FOLDER.glob("*.h")]:
        shutil.copy(path, folder)
    return folder


def libraries(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix not in (".cpp", ".h"))


def hook(build, **told):
    """The hook as the build backend calls it, and what it warned of."""
    warnings = []
    made = SimpleNamespace(
        target_name=told.get("target", "wheel"),
        app=SimpleNamespace(display_warning=warnings.append),
    )
    data = {"artifacts": [], "pure_python": True}
    build.KernelsHook.initialize(made, "standard", data)
    return data, warnings


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")) or platform.machine() != "x86_64",
    reason="no compiler",
)
def test_one_library_for_each_instruction_set(build, sources, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    built = build.compile_kernels(sources)
    assert [path.name for path in built] == ["kernels-avx512.so", "kernels-avx2.so"]
    assert libraries(sources) == ["kernels-avx2.so", "kernels-avx512.so"]


def test_the_loader_knows_the_sources_by_the_same_fingerprint(build, sources):
    assert build.fingerprint(native.FOLDER) == native._fingerprint()
    before = build.fingerprint(sources)
    assert before == native._fingerprint()
    (sources / "walks.cpp").rename(sources / "strolls.cpp")
    assert build.fingerprint(sources) != before


@pytest.mark.parametrize(
    ("compiler", "reason"), [("/nowhere/g++", "No such file"), ("false", "failed")]
)
def test_a_compiler_that_fails_leaves_what_was_there(build, sources, monkeypatch, compiler, reason):
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.setenv("CXX", compiler)
    (sources / "kernels-avx512.so").write_bytes(b"before")
    with pytest.raises(RuntimeError, match=reason):
        build.compile_kernels(sources)
    assert libraries(sources) == ["kernels-avx512.so"]
    assert (sources / "kernels-avx512.so").read_bytes() == b"before"


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
def test_machines_of_another_kind_go_without(build, sources, monkeypatch, machine):
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    with pytest.raises(RuntimeError, match=machine):
        build.compile_kernels(sources)


def test_the_installation_goes_on_without_a_compiler(build, sources, monkeypatch):
    monkeypatch.setattr(build, "FOLDER", sources)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    data, warnings = hook(build)
    assert data == {"artifacts": [], "pure_python": True}
    assert len(warnings) == 1
    assert "without its kernels" in warnings[0]


def test_a_wheel_takes_the_libraries_and_is_one_of_this_machine(build, sources, monkeypatch):
    monkeypatch.setattr(build, "FOLDER", sources)
    made = [sources / "kernels-avx512.so", sources / "kernels-avx2.so"]
    monkeypatch.setattr(build, "compile_kernels", lambda folder: made)
    data, warnings = hook(build)
    assert data["artifacts"] == ["/recclr/cpp/kernels-avx512.so", "/recclr/cpp/kernels-avx2.so"]
    assert not data["pure_python"]
    assert data["infer_tag"]
    assert not warnings


def test_a_source_distribution_compiles_nothing(build, monkeypatch):
    monkeypatch.setattr(build, "compile_kernels", None)
    assert hook(build, target="sdist") == ({"artifacts": [], "pure_python": True}, [])


def test_the_interpreter_here_has_its_kernels():
    """A checkout that was installed where there is a compiler: they must be there and be used."""
    wanted = sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which("g++")
    wanted = wanted and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if not wanted or os.environ.get("RECCLR_NATIVE") == "0":
        pytest.skip("there is no compiler, or they are turned off")
    assert native.why_not() is None
