"""Training from shards beside training from memory: speed, memory, and the same weights.

    python pipelines/benchmark_shards.py                       100 M generated rows; 10 GB of memory
    python pipelines/benchmark_shards.py --rows 10_000_000     less of both
    python pipelines/benchmark_shards.py --json FILE           the same as JSON

Two processes train the same model on the same log, one from memory, one from memory-mapped shards,
and take turns, four to a round, so a ratio is that of neighbours in time. First with the files in
the page cache, then (Linux) with the files put out of it before every round. A round is a window of
rows long, as much as is read ahead at a time. Threads are as the environment sets them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Any

import torch
import typer
from bench import machine
from bench.bursts import PIECE
from bench.data import LogSpec
from bench.options import JsonFile, require_place
from bench.runner import PIPELINES
from rich.console import Console
from rich.table import Table

import recclr
from recclr.console import say
from recclr.files import require_space
from recclr.windows import window_length

_TURNS = 4

Burst = Callable[[dict[str, Any]], dict[str, Any]]


def main(
    rows: Annotated[int, typer.Option(min=1_000, help="of the generated log")] = 100_000_000,
    users: Annotated[int | None, typer.Option(min=2, help="by default a 100th of the rows")] = None,
    items: Annotated[int | None, typer.Option(min=2, help="by default a 1,000th of them")] = None,
    steps: Annotated[
        int | None, typer.Option(min=_TURNS, help="of a round; by default a window of rows")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="of both, warm and cold")] = 5,
    dim: Annotated[int, typer.Option(min=1)] = 64,
    batch_size: Annotated[int, typer.Option(min=2)] = 8_192,
    negatives: Annotated[int, typer.Option(min=1, help="uniform draws of a step")] = 1_024,
    folder: Annotated[
        Path | None, typer.Option(file_okay=False, help="for the shards; else a temporary one")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure, and print both sides of each comparison."""
    require_place(json_file)
    log = LogSpec(users or max(rows // 100, 2), items or max(rows // 1_000, 2), rows)
    task = {
        "log": asdict(log),
        "dim": dim,
        "batch_size": batch_size,
        "negatives": negatives,
        "in_batch": False,
        "features": False,
        "optimizer": "rowwise_adagrad",
        "device": "cpu",
        "piece": PIECE,
    }
    length = steps or window_length(rows, batch_size) // batch_size
    with tempfile.TemporaryDirectory(dir=folder, prefix="shards-") as place:
        require_space(Path(place), 20 * rows)
        report = run(task, Path(place), steps=max(length // _TURNS, 1), rounds=rounds)
    report["log"] = str(log)
    show(report, Console(width=120, highlight=False))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def run(task: dict[str, Any], place: Path, *, steps: int, rounds: int) -> dict[str, Any]:
    """Both processes, made ready one after the other and then in turns of ``steps``."""
    phases = ["warm", "cold"] if hasattr(os, "posix_fadvise") else ["warm"]
    say("making the log in memory ready")
    with training(task | {"shards": None}, place / "resident.json") as (resident, first):
        say("writing the shards, and making them ready")
        with training(task | {"shards": str(place / "log")}, place / "mapped.json") as (
            mapped,
            second,
        ):
            found = {}
            ask = {"steps": steps, "cold": False}
            # The first steps of either allocate what the others use again.
            for one in (resident, mapped):
                one(ask)
            for phase in phases:
                say(f"{phase}: {rounds} rounds of {_TURNS} turns of {steps} steps")
                pairs = [one_round(resident, mapped, ask, phase == "cold") for _ in range(rounds)]
                found[phase] = compared(pairs, _TURNS * steps * task["batch_size"])
    ours, theirs = pairs[-1]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": machine.device_name("cpu"),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "steps": _TURNS * steps,
        "rounds": rounds,
        "ready": {"resident": first, "shards": second},
        "phases": found,
        "same_weights": ours["weights"] == theirs["weights"],
    }


def one_round(
    resident: Burst, mapped: Burst, ask: dict[str, Any], cold: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What turns of both came to: seconds in all, the highest peak, the weights at the end."""
    turns = [
        (resident(ask), mapped(ask | {"cold": cold and number == 0})) for number in range(_TURNS)
    ]
    ours, theirs = (
        {
            "seconds": sum(turn["seconds"] for turn in side),
            "peak_mb": max(turn["peak_mb"] for turn in side),
            "weights": side[-1]["weights"],
        }
        for side in zip(*turns, strict=True)
    )
    return ours, theirs


def compared(pairs: list[tuple[dict[str, Any], dict[str, Any]]], amount: int) -> dict[str, Any]:
    """Medians of rounds of ``amount`` positives, and of the ratio of both sides of a round."""
    ratios = [resident["seconds"] / mapped["seconds"] for resident, mapped in pairs]
    sides = zip(*pairs, strict=True)
    found: dict[str, Any] = {
        name: {
            "per_s": amount / statistics.median(burst["seconds"] for burst in side),
            "peak_mb": max(burst["peak_mb"] for burst in side),
        }
        for name, side in zip(("resident", "shards"), sides, strict=True)
    }
    return found | {"ratio": statistics.median(ratios), "ratios": ratios}


@contextmanager
def training(task: dict[str, Any], task_file: Path) -> Iterator[tuple[Burst, dict[str, Any]]]:
    """A process that trains when asked, and what it said of getting ready.

    Raises:
        RuntimeError: it ended early.
    """
    task_file.write_text(json.dumps(task), "utf-8")
    paths = [str(PIPELINES), str(Path(recclr.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "bench.bursts", str(task_file)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def burst(asked: dict[str, Any]) -> dict[str, Any]:
            stdin.write(json.dumps(asked) + "\n")
            stdin.flush()
            return answer(stdout)

        try:
            yield burst, answer(stdout)
        finally:
            stdin.close()


def answer(stdout: IO[str]) -> dict[str, Any]:
    line = stdout.readline()
    if not line:
        raise RuntimeError("a process that trains ended; its stderr says why")
    found: dict[str, Any] = json.loads(line)
    return found


def show(report: dict[str, Any], console: Console) -> None:
    """The machine, then one line per side and phase."""
    load = " ".join(f"{value:.1f}" for value in report["load"]) if report["load"] else "unknown"
    console.print(f"{report['device']}, {report['threads']} threads, load {load}, {report['date']}")
    same = "the same to the bit" if report["same_weights"] else "NOT the same"
    console.print(f"log: {report['log']}; weights at the end: {same}")
    table = Table(
        title=f"{report['rounds']} rounds of {report['steps']} steps", title_justify="left"
    )
    for name in ("log", "files", "rate", "of resident", "range", "memory", "while made ready"):
        table.add_column(name, justify="left" if name in ("log", "files") else "right")
    for phase, found in report["phases"].items():
        for side in ("resident", "shards"):
            mapped = side == "shards"
            low, high = min(found["ratios"]), max(found["ratios"])
            table.add_row(
                side,
                phase if mapped else "",
                f"{found[side]['per_s']:,.0f} positives/s",
                f"{found['ratio']:.0%}" if mapped else "",
                f"{low:.0%} to {high:.0%}" if mapped else "",
                f"{found[side]['peak_mb']:,.0f} MB",
                f"{report['ready'][side]['ready_peak_mb']:,.0f} MB",
            )
    console.print(table)
    console.print(
        "memory: peak of the process, pages of mapped files that it has touched included."
    )


if __name__ == "__main__":
    typer.run(main)
