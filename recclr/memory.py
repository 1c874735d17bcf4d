"""How much memory this process holds, has held, and may still take."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CGROUPS = Path("/sys/fs/cgroup")
# Files of version 2, then of version 1; a limit is in the second of each line.
_LIMITS = (
    ("", "memory.max", "memory.current"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_CACHE = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")


def available_bytes(*, proc: Path = Path("/proc"), cgroups: Path = _CGROUPS) -> int | None:
    """Memory that can be had without pushing anybody out; None where the system does not say.

    The least of what the machine has free or in caches, and what the limits of the process's
    control groups (containers, batch systems) leave it.
    """
    free = _figure(proc / "meminfo", "MemAvailable")
    found = [] if free is None else [free]
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        for folder, limit, usage in _LIMITS:
            if controllers == "" if not folder else folder in controllers.split(","):
                place = cgroups / folder
                # A limit of any group above counts as well; within a container, "/" is its own.
                for part in ("", *Path(path.lstrip("/")).parts):
                    place = place / part
                    found += _left(place, limit, usage)
    return max(0, min(found)) if found else None


def held_bytes() -> int | None:
    """Resident memory of this process; None where the system does not say."""
    return _figure(_STATUS, "VmRSS")


def anonymous_bytes() -> int | None:
    """Memory of this process without a file behind it, which the system cannot take back."""
    return _figure(_STATUS, "RssAnon")


def peak_bytes() -> int | None:
    """The most that was resident since ``forget_peak``; None where the system does not say."""
    return _figure(_STATUS, "VmHWM")


def forget_peak() -> None:
    """Measure the peak from here on; where that is not possible, it stays that of all the time."""
    with suppress(OSError):
        # 5 sets the high-water mark back to what is resident (proc(5)).
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def _figure(path: Path, name: str) -> int | None:
    """Bytes of an entry in kB of a file of /proc; None where there is none."""
    for line in _lines(path):
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None


def _left(group: Path, limit: str, usage: str) -> list[int]:
    """What the limit of one group leaves, caches of files not counted; empty without a limit."""
    limits, used = _lines(group / limit), _lines(group / usage)
    if not (limits and used and limits[0].isdecimal() and used[0].isdecimal()):
        return []
    stat = dict(line.split()[:2] for line in _lines(group / "memory.stat"))
    total = any(name.startswith("total_") for name in stat)
    cache = sum(int(stat.get(name, 0)) for name in _CACHE if name.startswith("total_") == total)
    return [int(limits[0]) - int(used[0]) + cache]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("ascii", "replace").splitlines()
    except OSError:
        return []
