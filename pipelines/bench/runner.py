"""Rows measured one after the other, each in a process of its own, and put together."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import recclr
from bench.child import ABSENT
from bench.floors import Rates, Work
from bench.grid import Row
from recclr.memory import available_bytes

PIPELINES = Path(__file__).parents[1]
_RECCLR = Path(recclr.__file__).parents[1]
_KEPT_FREE = 1 << 30

# What measuring a row gives: the result of its ``measure``, or why there is none.
Measured = dict[str, Any] | str
Measure = Callable[[Row], Measured]


def in_child(
    row: Row, *, limit_s: float, interpreters: Sequence[str] = (sys.executable,)
) -> Measured:
    """Measure a row in a fresh process, which ends with it or after ``limit_s`` seconds.

    Args:
        interpreters: Python executables; the first that has the row's library measures it.
    """
    for python in interpreters:
        result = _one_child(row, python, limit_s)
        if result is not None:
            return result
    return f"{row.library} is not installed"


def _one_child(row: Row, python: str, limit_s: float) -> Measured | None:
    """None where this interpreter lacks the library."""
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "task.json", Path(folder) / "result.json"
        asked = {"library": row.library, "module": row.module, "task": row.task}
        task.write_text(json.dumps(asked), "utf-8")
        try:
            done = subprocess.run(
                [python, "-m", "bench.child", str(task), str(result)],
                cwd=folder,
                env=_environment(python),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"took more than {limit_s:g} s"
        except OSError as error:
            return f"{python}: {error.strerror}"
        if done.returncode == ABSENT:
            return None
        if done.returncode < 0:
            return f"ended by signal {-done.returncode}, as when memory runs out"
        if done.returncode or not result.exists():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return lines[-1][:200]
        return json.loads(result.read_text("utf-8"))


def _environment(python: str) -> dict[str, str]:
    """As here, with the modules of this folder; recclr as well for this interpreter.

    PYTHONPATH is not for other interpreters: it would give them libraries of the wrong version.
    """
    environment = dict(os.environ)
    paths = [str(PIPELINES)]
    if python == sys.executable:
        paths += [str(_RECCLR), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def run_rows(
    rows: Sequence[Row], measure: Measure, *, rounds: int = 1, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every row once per round, in turn, so that rows that are compared share good and bad moments.

    Returns:
        one entry per row: what it measured in all rounds together, or ``skipped``, the reason.
    """
    found: list[list[Measured]] = [[] for _ in rows]
    walls = [0.0] * len(rows)
    for number in range(rounds):
        for place, (row, results) in enumerate(zip(rows, found, strict=True)):
            if results and isinstance(results[-1], str):
                continue
            say(f"{row.section}: {row.what}" + f" (round {number + 1} of {rounds})" * (rounds > 1))
            began = time.perf_counter()
            results.append(_too_large(row) or measure(row))
            walls[place] += time.perf_counter() - began
    return [
        _joined(row, results) | {"wall_s": wall}
        for row, results, wall in zip(rows, found, walls, strict=True)
    ]


def _too_large(row: Row) -> str | None:
    available = available_bytes() if row.task["device"] == "cpu" else None
    if available is None or row.needed_bytes + _KEPT_FREE <= available:
        return None
    needed, free = row.needed_bytes / 2**30, available / 2**30
    return f"needs about {needed:.1f} GiB, {free:.1f} GiB of memory are free"


def _joined(row: Row, results: Sequence[Measured]) -> dict[str, Any]:
    """One entry of the report, floors left to ``add_floors``."""
    entry: dict[str, Any] = {"section": row.section, "what": row.what, "against": row.against}
    entry |= {
        key: row.task[key]
        for key in ("dim", "batch_size", "negatives", "in_batch", "features", "optimizer")
        if key in row.task
    }
    reasons = [result for result in results if isinstance(result, str)]
    measured = [result for result in results if not isinstance(result, str)]
    if not measured:
        return entry | {"skipped": reasons[-1]}
    seconds = sorted(second for result in measured for second in result["seconds"])
    median = statistics.median(seconds)
    last = len(seconds) - 1
    known = {key: value for key, value in measured[-1].items() if key != "seconds"}
    return (
        entry
        | known
        | {
            "measured_s": median,
            "quartiles_s": [seconds[last // 4], seconds[last - last // 4]],
            "repeats": len(seconds),
            "rounds": len(measured),
            "per_s": known["amount"] / median,
            "cores": statistics.median(result["cores"] for result in measured),
            "peak_memory_mb": max(result["peak_memory_mb"] for result in measured),
            "gemm": [result["gemm"] for result in measured if "gemm" in result],
            "copy": [result["copy"] for result in measured if "copy" in result],
        }
    )


def median_rates(entries: Sequence[dict[str, Any]]) -> Rates | None:
    """The machine's rates over all rows of the run; None where no row measured them."""
    gemm = [rate for entry in entries for rate in entry.get("gemm", [])]
    copy = [rate for entry in entries for rate in entry.get("copy", [])]
    if not gemm:
        return None
    return Rates(gemm=statistics.median(gemm), copy=statistics.median(copy))


def add_floors(entries: Sequence[dict[str, Any]], rates: Rates | None) -> None:
    """Floor, ratio and what bounds it, at one rate for all rows; and peers beside recclr.

    A peer's floor is that of the recclr row with its negatives, per positive.
    """
    for entry in entries:
        if rates is not None and "flop" in entry:
            work = Work(entry["flop"], entry["row_bytes"])
            entry["bound"] = work.bound(rates)
            _add_floor(entry, work.floor_s(rates))
    by_name = {(entry["section"], entry["what"]): entry for entry in entries}
    for entry in entries:
        twin = by_name.get((entry["section"], entry["against"]), {})
        if "per_s" in twin and "per_s" in entry:
            entry["recclr_times"] = twin["per_s"] / entry["per_s"]
            if "floor_s" in twin:
                _add_floor(entry, twin["floor_s"] / twin["amount"] * entry["amount"])


def _add_floor(entry: dict[str, Any], floor_s: float) -> None:
    entry["floor_s"] = floor_s
    entry["ratio"] = floor_s / entry["measured_s"]
