"""What comes before and after training on a large log: seconds and memory of each step.

    python pipelines/benchmark_data.py                       20 M generated rows; 2 GB of memory
    python pipelines/benchmark_data.py --rows 60_000_000     more of both
    python pipelines/benchmark_data.py --free-gb 1           as where a GB of memory is free
    python pipelines/benchmark_data.py --json FILE           the same as JSON

A Parquet file of rows in no order, items by a power law, is read as ``recclr train`` reads it
(checked, duplicates dropped, in log order), split in each way, encoded; then its spectral solution
is made, and intervals of made-up metrics of a hundredth of its rows' users. A log that half of the
free memory would not hold is read piece by piece and lies on the disk. Peaks are of memory without
files behind it, above what the process held before it read anything; it is looked at every 5 ms.
Threads are as the environment sets them.
"""

from __future__ import annotations

import tempfile
import threading
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
from recclr.data import reading, sharding
from recclr.data.prepare import prepare_for
from recclr.data.prepared import PreparedLog
from recclr.data.reading import read_log
from recclr.data.shards import write_shards
from recclr.files import write_json_atomic
from recclr.memory import anonymous_bytes
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
    free_gb: Annotated[
        float | None,
        typer.Option(min=0.01, help="memory to reckon with, by default the free"),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure, and print a line for each step."""
    require_place(json_file)
    if free_gb is not None:
        free = int(free_gb * 1e9)
        reading.available_bytes = sharding.available_bytes = lambda: free
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events.parquet"
        _generated(rows, users or max(rows // 50, 2), items or max(rows // 200, 2), events)
        steps = _measured(parse_config({"data": {"events": str(events)}}), rows, dim, Path(folder))
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": machine.device_name("cpu"),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "free_gb": free_gb,
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


def _measured(config: Config, rows: int, dim: int, folder: Path) -> list[dict[str, Any]]:
    watch = _Watch()
    with watch.step("read"):
        log = read_log(config.data, workspace=folder)
    on_disk = log.disk is not None
    with watch.step("split by time"):
        split = log.split(SplitSettings(by="time", valid=0.1, test=0.1))
    for by, settings in _OTHERS.items():
        with watch.step(f"split by {by}"):
            log.split(settings)
    del log
    with watch.step("encode"):
        prepared = prepare_for(config, split.train, split.valid, ())
    del split
    with watch.step("write and map again"):
        prepared.save(folder / "prepared")
        PreparedLog.load(folder / "prepared")
    if on_disk:
        with watch.step("shards to train from"):
            write_shards(folder / "shards", prepared.tensors.train.stretches())
        return watch.steps
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
        self.base = anonymous_bytes() or 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        peaks, done = [self.base], threading.Event()

        def look() -> None:
            while not done.wait(0.005):
                peaks.append(anonymous_bytes() or 0)

        looker = threading.Thread(target=look)
        looker.start()
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            done.set()
            looker.join()
        above = max(peaks) - self.base
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
        shown = f"{peak / 1e9:.2f} GB", f"{peak / rows:.0f}"
        table.add_row(step["name"], f"{step['seconds']:.1f}", *shown)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
