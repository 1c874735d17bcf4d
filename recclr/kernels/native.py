"""The kernels for CPUs that were compiled when recclr was installed (``recclr/cpp``).

They do what the twins in PyTorch do, in blocks that stay in registers and the second-level cache,
with PyTorch's own threads: a step's loss with its gradients in a third of the time, an update of a
table in one pass over its rows. Where they are missing, the twins run. RECCLR_NATIVE=0 in the
environment turns them off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recclr.errors import ShapeError

FOLDER = Path(__file__).parents[1] / "cpp"
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_OPENMP = re.compile(r"(/.*/lib(?:gomp|iomp5|omp)\b[^/]*)$")
# Sizes of a problem, its five arrays, number of masked pairs, threads, floats in cache, buffer.
_PROBLEM = [_INT] * 3 + [_POINTER] * 5 + [_INT] * 3 + [_POINTER]
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "recclr_room": ([_INT] * 5 + [ctypes.c_int32], _INT),
    "recclr_logsumexp": ([*_PROBLEM, _POINTER], None),
    "recclr_logsumexp_backward": ([*_PROBLEM, *[_POINTER] * 5], None),
    "recclr_contrastive": ([*_PROBLEM, *[_POINTER] * 3, _FLOAT, *[_POINTER] * 5], None),
    "recclr_distilled_room": ([_INT] * 6, _INT),
    "recclr_distilled": ([*_PROBLEM, _INT, *[_POINTER] * 6], None),
    "recclr_group": ([_INT, *[_POINTER] * 6, *[_INT] * 3], _INT),
    "recclr_move": (
        [ctypes.c_int32, _INT, *[_POINTER] * 6, _INT, *[_POINTER] * 4, _FLOAT, _INT],
        None,
    ),
    "recclr_bags": ([_INT] * 3 + [_POINTER] * 5 + [_INT, _POINTER, _INT], _INT),
    "recclr_unit": ([_INT] * 2 + [_POINTER] * 3 + [_INT], None),
    "recclr_unit_backward": ([_INT] * 2 + [_POINTER] * 4 + [_INT], None),
    "recclr_top_k_room": ([_INT] * 4, _INT),
    "recclr_top_k_pack": ([_INT, _INT, _POINTER, _INT, _POINTER], None),
    "recclr_top_k": ([_INT] * 4 + [_POINTER] * 3 + [_INT] + [_POINTER] * 3, _INT),
    "recclr_resample": ([_INT, _INT, _POINTER, _POINTER, _INT], None),
    "recclr_tell": ([_POINTER, _INT], None),
    "recclr_await": ([_POINTER, *[_INT] * 5], _INT),
    "recclr_known_of_rows": ([_INT, *[_POINTER] * 7, _INT], _INT),
    "recclr_known_of_candidates": (
        [_INT, _POINTER, _INT, *[_POINTER] * 6, _INT, *[_POINTER] * 3],
        _INT,
    ),
}
_GRAIN = 1 << 15
_off = False


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they are missing or turned off."""
    return None if _off else _loaded()[0]


def why_not() -> str | None:
    """Why the compiled kernels are not used; None where they are."""
    return "turned off" if _off else _loaded()[1]


def kernels_exist() -> bool:
    """Whether there are compiled kernels for processors of this kind at all."""
    return sys.platform == "linux" and _kind() in ("avx2", "avx512")


def description() -> str:
    """Which kernels run on the CPU, for a person."""
    reason = why_not()
    return f"compiled, {_kind().upper()}" if reason is None else f"those of PyTorch alone: {reason}"


@contextmanager
def turned_off() -> Iterator[None]:
    """Within it the twins in PyTorch run."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def usable(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """The kernels, for tensors that are all on the CPU."""
    found = library()
    if found is None or any(each is not None and each.device.type != "cpu" for each in tensors):
        return None
    return found


def address(x: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
    """Where its data lie; the caller keeps the tensor until the call is over.

    Raises:
        ShapeError: a kernel would read something else there.
    """
    if x is None:
        return None
    if x.dtype != dtype or x.device.type != "cpu" or not x.is_contiguous():
        raise ShapeError(
            f"a kernel needs {dtype} without gaps on the CPU, found {x.dtype} of strides "
            f"{x.stride()} on {x.device}"
        )
    return x.data_ptr()


def longs(*tensors: Tensor | None) -> list[int | None]:
    """Addresses of int64."""
    return [address(x, torch.int64) for x in tensors]


def floats(*tensors: Tensor | None) -> list[int | None]:
    """Addresses of float32."""
    return [address(x) for x in tensors]


def threads_for(work: int) -> int:
    """Threads for so many multiply-adds: below PyTorch's own grain one, which waits for nobody."""
    return torch.get_num_threads() if work >= _GRAIN else 1


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("RECCLR_NATIVE", "1") == "0":
        return None, "RECCLR_NATIVE=0 turns them off"
    if not kernels_exist():
        return None, f"there are none for {platform.machine()} ({_kind()}) on {sys.platform}"
    path = FOLDER / f"kernels-{_kind()}.so"
    if not path.is_file():
        return None, f"{path.name} is missing: recclr was installed without g++ (see the README)"
    try:
        openmp = _openmp()
        if openmp is None:
            return None, "PyTorch runs without OpenMP, whose threads they would share"
        # Their OpenMP is not linked: what PyTorch has loaded already shall answer.
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        found = ctypes.CDLL(str(path))
        found.recclr_sources.restype = ctypes.c_char_p
        if found.recclr_sources().decode() != _fingerprint():
            return None, f"{path.name} was compiled from other sources: install recclr again"
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:
        return None, f"{path.name}: {error}"
    return found, None


def _kind() -> str:
    """The instruction set that PyTorch chose, which the environment can tell it."""
    return torch.backends.cpu.get_cpu_capability().lower()


def _openmp() -> str | None:
    """The OpenMP library that PyTorch loaded into this process."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    found = {match.group(1) for line in lines if (match := _OPENMP.search(line))}
    home = str(Path(torch.__file__).parent)
    # Another library may have brought a second one; PyTorch's own comes with it.
    return min(found, key=lambda path: (not path.startswith(home), path), default=None)


def _fingerprint() -> str:
    """As ``hatch_build.fingerprint``."""
    digest = hashlib.sha256()
    for path in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
