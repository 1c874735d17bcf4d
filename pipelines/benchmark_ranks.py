"""A step of several processes of one machine beside the same step of one.

    python pipelines/benchmark_ranks.py                   two processes with one thread each
    python pipelines/benchmark_ranks.py --json FILE       the same as JSON

One process with as many threads as all ranks have together, then the ranks, in turns, at the same
global batch. Gowalla's train rows where RECCLR_DATA has them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench import data, machine
from bench.options import JsonFile, require_place
from bench.runner import PIPELINES
from rich.console import Console
from rich.table import Table

import recclr
from recclr.console import say
from recclr.kernels import native

_BATCHES = (2_048, 8_192)


def main(
    ranks: Annotated[int, typer.Option(min=2, help="processes")] = 2,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=2, help="of all ranks; may be given more than once")
    ] = None,
    dim: Annotated[int, typer.Option(min=1)] = 64,
    negatives: Annotated[int, typer.Option(min=1, help="uniform draws of a step")] = 1_024,
    features: Annotated[bool, typer.Option(help="a history, tags and an image, and MLPs")] = False,
    steps: Annotated[int, typer.Option(min=1, help="of a turn")] = 60,
    rounds: Annotated[int, typer.Option(min=1, help="turns of each side")] = 3,
    rows: Annotated[
        int | None, typer.Option(min=100, help="of a generated log instead of Gowalla's")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure, and print both sides of each comparison."""
    require_place(json_file)
    log = data.gowalla() if rows is None else data.LogSpec(rows // 20 + 2, rows // 20 + 2, rows)
    found = []
    for size in batch_size or _BATCHES:
        task = {
            "log": asdict(log),
            "dim": dim,
            "batch_size": size,
            "negatives": negatives,
            "in_batch": False,
            "features": features,
            "optimizer": "adam",
            "device": "cpu",
            "threads": ranks,
            "steps": steps,
        }
        say(f"batch {size:,}: {rounds} rounds of {steps} steps on both sides")
        pairs = [(one_turn(task, 1), one_turn(task, ranks)) for _ in range(rounds)]
        found.append({"batch_size": size, **compared(pairs)})
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": machine.device_name("cpu"),
        "kernels": native.description(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "log": str(log),
        "dim": dim,
        "negatives": negatives,
        "features": features,
        "ranks": ranks,
        "rows": found,
    }
    show(report, Console(width=120, highlight=False))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def one_turn(task: dict[str, Any], ranks: int) -> dict[str, Any]:
    """What ``bench.ranked`` found in processes of their own.

    Raises:
        RuntimeError: they failed.
    """
    paths = [str(PIPELINES), str(Path(recclr.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # By default torchrun gives each rank one thread, and says so at length.
    environment["OMP_NUM_THREADS"] = str(max(1, task["threads"] // ranks))
    started = [sys.executable, "-m"]
    if ranks > 1:
        started += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    with tempfile.TemporaryDirectory() as folder:
        asked, result = Path(folder) / "task.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(task), "utf-8")
        done = subprocess.run(
            [*started, "bench.ranked", str(asked), str(result)],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode or not result.exists():
            raise RuntimeError(f"{ranks} processes ended with {done.returncode}:\n{done.stderr}")
        answer: dict[str, Any] = json.loads(result.read_text("utf-8"))
    return answer


def compared(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Medians of both sides' steps in ms, and of the ratio of both sides of a round."""
    turns = [tuple(statistics.median(side["seconds"]) for side in pair) for pair in pairs]
    ratios = [ranks / one for one, ranks in turns]
    alone, shared = (statistics.median(side) for side in zip(*turns, strict=True))
    return {
        "one_ms": 1e3 * alone,
        "ranks_ms": 1e3 * shared,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The machine, then one line per batch size."""
    console.print(
        f"{report['device']}, {report['cores']} cores, torch {report['torch']}, kernels "
        f"{report['kernels']}, {report['date']}"
    )
    console.print(
        f"log: {report['log']}; d {report['dim']}, {report['negatives']:,} negatives"
        f"{', with features' if report['features'] else ''}"
    )
    ranks = report["ranks"]
    table = Table(title=f"{ranks} processes beside one", title_justify="left")
    for name in ("batch", f"one, {ranks} threads", f"{ranks}, one thread each", "times", "range"):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        table.add_row(
            f"{row['batch_size']:,}",
            f"{row['one_ms']:.1f} ms",
            f"{row['ranks_ms']:.1f} ms",
            f"{row['ratio']:.2f}",
            f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
