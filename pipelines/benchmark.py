"""Speed and memory of training and evaluation, beside the floor that this machine's GEMM allows.

    python pipelines/benchmark.py            a table
    python pipelines/benchmark.py --json F   the same as JSON

Floors (6·B·N·D and 2·Q·V·D multiply-adds) use the GEMM rate measured in the same run; medians over
repeats. Uses Gowalla's log where RECCLR_DATA holds it, a generated log of its size elsewhere.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from recclr.batches import BatchSource
from recclr.data.log import Csr, EncodedLog, FeatureTable, Prepared
from recclr.objective import Objective
from recclr.optimizers import Optimizers
from recclr.settings import (
    LossSettings,
    ModelSettings,
    NegativesSettings,
    TowerSettings,
    TrainSettings,
)
from recclr.topk import top_k
from recclr.towers import TwoTower, build_model

NUM_USERS, NUM_ITEMS, NUM_ROWS = 29_858, 40_981, 810_128


def main(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the rows here too")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    seconds: Annotated[float, typer.Option(help="time per measurement")] = 5.0,
) -> None:
    """Measure, and print one row per setting."""
    log, source = gowalla_log()
    log = log.to(device)
    rate = gemm_rate(device)
    rows = [
        train_row(log, rate, batch_size=batch_size, uniform=1024, dim=dim, seconds=seconds)
        for dim in (64, 128)
        for batch_size in (2048, 8192)
    ]
    rows.append(evaluation_row(log, rate, dim=64, k=20))
    report = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "log": source,
        "gemm_gflops": rate / 1e9,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rows": rows,
    }
    show(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def gowalla_log() -> tuple[EncodedLog, str]:
    """Gowalla's train rows, or as many random ones with a Zipf-like popularity."""
    folder = Path(os.environ.get("RECCLR_DATA", "../shared/data")) / "gowalla-lightgcn"
    path = folder / "interactions_train.parquet"
    if path.is_file():
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        columns = [torch.tensor(table[name].to_numpy()) for name in ("user_id", "item_id")]
        return EncodedLog(columns[0].int(), columns[1].int(), NUM_USERS, NUM_ITEMS), str(path)
    draws = torch.Generator().manual_seed(0)
    users = torch.randint(NUM_USERS, (NUM_ROWS,), generator=draws)
    items = (torch.rand(NUM_ROWS, generator=draws) ** 2 * NUM_ITEMS).long()
    return EncodedLog(users.int(), items.int(), NUM_USERS, NUM_ITEMS), "generated"


def gemm_rate(device: str) -> float:
    """Multiply-adds per second × 2 of a large float32 product, median of several."""
    a = torch.randn(2048, 2048, device=device)
    times = [timed(lambda: a @ a, device) for _ in range(9)]
    return 2 * 2048**3 / statistics.median(times[2:])


def train_row(
    log: EncodedLog, rate: float, *, batch_size: int, uniform: int, dim: int, seconds: float
) -> dict[str, Any]:
    """Whole steps: batch, draws, towers, masks, loss, backward, update."""
    device = log.item_idx.device
    loss = LossSettings(temperature=0.08)
    negatives = NegativesSettings(in_batch=False, uniform=uniform)
    settings = TrainSettings(batch_size=batch_size)
    model = fresh_model(log, loss, dim).to(device).train()
    objective = Objective(log, loss, negatives, seed=0)
    batches = BatchSource(log, settings, seed=0, time_cells=False)
    optimizers = Optimizers(model, settings, 10_000)

    def step(number: int) -> None:
        objective(model, batches.batch(number), number).loss.backward()
        optimizers.step(number)

    for number in range(10):
        step(number)
    times, number, began = [], 10, time.perf_counter()
    while time.perf_counter() - began < seconds:
        times.append(timed(lambda number=number: step(number), str(device)))
        number += 1
    median = statistics.median(times)
    floor = 6 * batch_size * uniform * dim / rate
    return {
        "what": f"train B={batch_size} N={uniform} D={dim} ids",
        "measured_s": median,
        "floor_s": floor,
        "ratio": floor / median,
        "per_s": batch_size / median,
        "unit": "positives/s",
        "repeats": len(times),
    }


def evaluation_row(log: EncodedLog, rate: float, *, dim: int, k: int) -> dict[str, Any]:
    """Exact top-k of every user over every item, train items left out."""
    device = log.item_idx.device
    draws = torch.Generator().manual_seed(0)
    queries = torch.randn(log.num_users, dim, generator=draws).to(device)
    corpus = torch.randn(log.num_items, dim, generator=draws).to(device)
    seen: Csr = log.user_items()
    top_k(queries[:2048], corpus, k)
    times = [timed(lambda: top_k(queries, corpus, k, seen=seen), str(device)) for _ in range(5)]
    median = statistics.median(times)
    floor = 2 * log.num_users * log.num_items * dim / rate
    return {
        "what": f"top-{k} of {log.num_users:,} x {log.num_items:,} D={dim}",
        "measured_s": median,
        "floor_s": floor,
        "ratio": floor / median,
        "per_s": log.num_users / median,
        "unit": "users/s",
        "repeats": len(times),
    }


def fresh_model(log: EncodedLog, loss: LossSettings, dim: int) -> TwoTower:
    prepared = Prepared(log.to("cpu"), FeatureTable(log.num_users), FeatureTable(log.num_items))
    return build_model(
        prepared,
        user=TowerSettings(),
        item=TowerSettings(),
        model=ModelSettings(embedding_dim=dim),
        loss=loss,
        seed=0,
    )


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of one call, to the end of its work on the device."""
    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def show(report: dict[str, Any]) -> None:
    """The report as a table on stdout."""
    title = (
        f"{report['device']}, torch {report['torch']}, GEMM {report['gemm_gflops']:.0f} GFLOP/s, "
        f"peak memory {report['peak_memory_mb']:.0f} MB"
    )
    table = Table("what", "measured", "floor", "floor / measured", "rate", title=title)
    for row in report["rows"]:
        table.add_row(
            row["what"],
            f"{row['measured_s'] * 1e3:,.1f} ms",
            f"{row['floor_s'] * 1e3:,.1f} ms",
            f"{row['ratio']:.2f}",
            f"{row['per_s']:,.0f} {row['unit']}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
