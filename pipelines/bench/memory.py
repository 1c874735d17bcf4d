"""Memory of this process. Standard library only, for interpreters of peers."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def reset_peak(device: str = "cpu") -> None:
    """Forget the largest memory so far: what was needed to make ready does not count."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        # 5 sets the high-water mark of resident memory back to what is resident (proc(5)).
        clear.write_text("5")


def peak_mb(device: str = "cpu") -> float:
    """Largest memory of this process since ``reset_peak``, interpreter and libraries included.

    Resident on a CPU (since the start where the system has no /proc), allocated on a GPU.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    high = _kilobytes(Path("/proc/self/status"), "VmHWM")
    if high is not None:
        return high / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes, but bytes on macOS.
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _kilobytes(path: Path, name: str) -> int | None:
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return None
