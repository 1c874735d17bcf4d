"""Speed and memory of training and exact ranking, beside the machine's floors and other trainers.

    python pipelines/benchmark.py                    the tables, in two to three minutes
    python pipelines/benchmark.py --peers            with other trainers; five minutes more
    python pipelines/benchmark.py --full             every d, B and N, with and without features
    python pipelines/benchmark.py --only growth --most-rows 100_000_000
    python pipelines/benchmark.py --json FILE        the same as JSON

Each row is measured in a process of its own. Floors use the rates of a matrix product and of a copy
measured in the same run; times are medians. An embedding table alone stands beside PyTorch's and
TorchRec's. The log is Gowalla's where RECCLR_DATA holds it, a generated one of its size elsewhere.
Threads are as the environment sets them (OMP_NUM_THREADS).

Other trainers are used where they are installed. Those that cannot live beside recclr's versions go
into an environment of their own, named by --peer-python; the first that has a library is taken.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench import data, grid, machine
from bench.options import JsonFile, require_place
from bench.runner import Measure, add_floors, in_child, median_rates, run_rows
from bench.show import show
from bench.versus import peer_rows, table_rows
from rich.console import Console

from recclr.console import say

_WIDTH = 150


class Preset(StrEnum):
    """How much is measured."""

    smoke = "smoke"
    standard = "standard"
    full = "full"


def main(
    json_file: JsonFile = None,
    preset: Annotated[Preset, typer.Option(help="how much is measured")] = Preset.standard,
    full: Annotated[bool, typer.Option("--full", help="the same as --preset full")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="measure other trainers too")] = False,
    peer_python: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Python to look for others in; repeatable"),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(grid.SECTIONS)}")] = None,
    most_rows: Annotated[
        int, typer.Option(help="grow generated logs to so many rows, items to a tenth")
    ] = 10_000_000,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    precision: Annotated[
        str, typer.Option(help="of recclr's training: auto, float32 or bfloat16")
    ] = "auto",
    seconds: Annotated[
        float, typer.Option(min=0.001, help="time per row and round, after warm-up")
    ] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, help="rounds over the rows that are compared")] = 3,
    limit: Annotated[
        float, typer.Option(min=1, help="seconds after which a row is given up")
    ] = 300.0,
) -> None:
    """Measure, and print one line per setting."""
    chosen = Preset.full if full else preset
    wanted = set(only or grid.SECTIONS)
    if unknown := wanted - set(grid.SECTIONS):
        raise typer.BadParameter(f"--only {sorted(unknown)}: choose of {', '.join(grid.SECTIONS)}")
    with_peers = peers or "peers" in (only or [])
    if with_peers and device != "cpu":
        raise typer.BadParameter(
            "--peers: other trainers are measured on the CPU, as is recclr then"
        )
    if precision not in ("auto", "float32", "bfloat16"):
        raise typer.BadParameter(f"--precision {precision}: choose auto, float32 or bfloat16")
    require_device(device)
    gemm_size = 256 if chosen == Preset.smoke else 2_048
    require_place(json_file)
    pythons = [sys.executable, *map(str, peer_python or [])]
    report = run(
        chosen,
        grid.Settings(device, seconds, gemm_size=gemm_size, precision=precision),
        sections=wanted | {"peers"} if with_peers else wanted - {"peers"},
        most_rows=most_rows,
        rounds=rounds,
        measure=partial(in_child, limit_s=limit, interpreters=pythons),
    )
    show(report, Console(width=_WIDTH, highlight=False))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def require_device(device: str) -> None:
    """Refuse what no row could be measured on."""
    if device == "cpu" or (device.startswith("cuda") and torch.cuda.is_available()):
        return
    raise typer.BadParameter(f"--device {device}: use cpu, or cuda where PyTorch finds a GPU")


def run(
    preset: str,
    settings: grid.Settings,
    *,
    sections: set[str],
    most_rows: int,
    rounds: int,
    measure: Measure,
    tell: Callable[[str], None] = say,
) -> dict[str, Any]:
    """The whole benchmark; what is printed, and written as JSON."""
    log = data.LogSpec(70, 50, 900) if preset == "smoke" else data.gowalla()
    own = grid.own_rows(preset, log, settings, most_rows=most_rows)
    entries = run_rows([row for row in own if row.section in sections], measure, say=tell)
    if "tables" in sections:
        entries += run_rows(table_rows(preset, settings), measure, rounds=rounds, say=tell)
    if "peers" in sections:
        with tempfile.TemporaryDirectory() as folder:
            arrays = data.write_arrays(log, Path(folder))
            threads = torch.get_num_threads()
            compared = peer_rows(preset, log, arrays, settings, threads=threads)
            entries += run_rows(compared, measure, rounds=rounds, say=tell)
    return described(entries, preset, str(log), settings.device)


def described(
    entries: Sequence[dict[str, Any]], preset: str, log: str, device: str
) -> dict[str, Any]:
    """The rows with their floors, and what they were measured on."""
    rates = median_rates(entries)
    add_floors(entries, rates)
    every = [rate / 1e9 for entry in entries for rate in entry.get("gemm", [])]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "preset": str(preset),
        "device": machine.device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        # Of the last 1, 5 and 15 minutes: beside other work, times say little.
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "log": log,
        "gemm_gflops": None if rates is None else rates.gemm / 1e9,
        "gemm_gflops_range": [min(every), max(every)] if every else None,
        "copy_gb_s": None if rates is None else rates.copy / 1e9,
        "rows": list(entries),
    }


if __name__ == "__main__":
    typer.run(main)
