"""What this machine does at best, measured in every row's process, so that noise meets both."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from bench.floors import Rates
from bench.timing import timed

_REPEATS, _FIRST = 7, 2


def rates(device: str, size: int = 2048) -> Rates:
    """Medians of a square matrix product and of a copy.

    Float32 on a CPU, bfloat16 on a GPU, whose towers and loss may use it.

    Args:
        size: rows of the product; the copy moves 16 times as many floats as the product holds.
    """
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.ones(16 * size * size, device=device)
    target = torch.empty_like(source)
    products = [timed(lambda: a @ a, device) for _ in range(_REPEATS)]
    copies = [timed(lambda: target.copy_(source), device) for _ in range(_REPEATS)]
    return Rates(
        gemm=2 * size**3 / statistics.median(products[_FIRST:]),
        copy=2 * source.nbytes / statistics.median(copies[_FIRST:]),
    )


def conditions(device: str, size: int) -> dict[str, Any]:
    """What a row was measured on and what that does at best, for its result.

    Args:
        size: as for ``rates``.
    """
    found = rates(device, size)
    return {
        "gemm": found.gemm,
        "copy": found.copy,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def device_name(device: str) -> str:
    """As it is printed above the table: a GPU's name, or a CPU's with the number of its cores."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"
