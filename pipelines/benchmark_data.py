"""What comes before and after training on a large log: seconds and memory of each step.

    python pipelines/benchmark_data.py                       20 M generated rows; 2 GB of memory
    python pipelines/benchmark_data.py --rows 60_000_000     more of both
    python pipelines/benchmark_data.py --json FILE           the same as JSON

A Parquet file of rows in no order, items by a power law, is read as ``recclr train`` reads it
(checked, duplicates dropped, in log order), split in each way, encoded; then its spectral solution
is made, and intervals of made-up metrics of a hundredth of its rows' users. Peaks are above what
the process held before it read anything. Threads are as the environment sets them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import typer
from bench import machine
from bench.options import JsonFile, require_place
from rich.console import Console
from rich.table import Table

from recclr.bootstrap import interval_of, resampled_means
from recclr.config import Config, parse_config
from recclr.data.prepare import prepare_for
from recclr.data.reading import read_log
from recclr.files import write_json_atomic
from recclr.memory import forget_peak, held_bytes, peak_bytes
from recclr.settings import SplitSettings
from recclr.spectral import spectral_factors

_OTHERS = {
    "random": SplitSettings(by="random", valid=0.1, test=0.1),
    "leave_last": SplitSettings(by="leave_last", valid=1, test=1),
}
_METRICS, _RESAMPLES = 40, 1000
_FIRST, _SPAN = 1_600_000_000, 50_000_000


def main(
    rows: Annotated[int, typer.Option(min=1_000, help="of the generated log")] = 20_000_000,
    users: Annotated[int | None, typer.Option(min=2, help="by default a 50th of the rows")] = None,
    items: Annotated[int | None, typer.Option(min=2, help="by default a 200th of them")] = None,
    dim: Annotated[int, typer.Option(min=1, help="of the spectral solution")] = 32,
    json_file: JsonFile = None,
) -> None:
    """Measure, and print a line for each step."""
    require_place(json_file)
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events.parquet"
        _generated(rows, users or max(rows // 50, 2), items or max(rows // 200, 2), events)
        steps = _measured(parse_config({"data": {"events": str(events)}}), rows, dim)
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": machine.device_name("cpu"),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "steps": steps,
    }
    if json_file is not None:
        write_json_atomic(json_file, found)
    _show(found)


def _generated(rows: int, users: int, items: int, path: Path) -> None:
    draws = np.random.default_rng(1)
    frame = pl.DataFrame(
        {
            "user_id": draws.integers(0, users, rows),
            "item_id": (draws.pareto(1.1, rows) * items / 1_000).astype(np.int64) % items,
            "timestamp": draws.integers(_FIRST, _FIRST + _SPAN, rows),
        }
    )
    frame.write_parquet(path)


def _measured(config: Config, rows: int, dim: int) -> list[dict[str, Any]]:
    watch = _Watch()
    with watch.step("read"):
        log = read_log(config.data)
    with watch.step("split by time"):
        split = log.split(SplitSettings(by="time", valid=0.1, test=0.1))
    for by, settings in _OTHERS.items():
        with watch.step(f"split by {by}"):
            log.split(settings)
    del log
    with watch.step("encode"):
        prepared = prepare_for(config, split.train, split.valid, ())
    del split
    with watch.step(f"spectral solution, {dim} dimensions"):
        spectral_factors(prepared.tensors.train, dim=dim)
    judged = max(rows // 100, 2)
    values = torch.rand(judged, _METRICS, dtype=torch.float64)
    with watch.step(f"intervals of {_METRICS} metrics of {judged:,} users"):
        interval_of(resampled_means(values, _RESAMPLES))
    return watch.steps


class _Watch:
    """Seconds of steps, and what they held at most beyond what the process did before the first."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.base = held_bytes() or 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        forget_peak()
        start = time.perf_counter()
        yield
        seconds, peak = time.perf_counter() - start, peak_bytes()
        above = None if peak is None else max(0, peak - self.base)
        self.steps.append({"name": name, "seconds": seconds, "peak_bytes": above})


def _show(found: dict[str, Any]) -> None:
    rows = found["rows"]
    table = Table(
        "step",
        "seconds",
        "peak",
        "bytes a row",
        title=f"{rows:,} rows, {found['threads']} threads, {found['device']}",
    )
    for step in found["steps"]:
        peak = step["peak_bytes"]
        shown = ("", "") if peak is None else (f"{peak / 1e9:.2f} GB", f"{peak / rows:.0f}")
        table.add_row(step["name"], f"{step['seconds']:.1f}", *shown)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
