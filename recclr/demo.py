"""``recclr demo``: the whole chain on a generated log, offline, in a few minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recclr.config import parse_config
from recclr.data.synthetic import SyntheticLog, generate_log
from recclr.errors import ConfigError
from recclr.export import recommend_from_store
from recclr.run import train_run
from recclr.run_folder import METRICS, read_json

_STORE = "store"
_CONFIG: dict[str, Any] = {
    "seed": 7,
    "item": {
        "id": {"as_of": True},
        "features": {
            "category": {"kind": "categorical", "dropout": 0.1},
            "tags": {"kind": "multi_hot", "dropout": 0.1},
            "price": {"kind": "numeric", "transform": "quantile"},
            "title": {"kind": "text", "buckets": 2000, "dropout": 0.1},
            "recent": {"kind": "statistics", "windows_d": [1.0, 3.0, 10.0, 30.0]},
        },
    },
    "user": {
        "id": {"enabled": False},
        "features": {"country": {"kind": "categorical", "dropout": 0.1}},
        "history": {"length": 50, "half_life_d": 30.0, "use": "both", "dropout": 0.1},
    },
    "model": {"init_std": 0.2},
    "negatives": {"in_batch": False, "uniform": 1024},
    "train": {
        "batch_size": 1024,
        "epochs": 8.0,
        "table_lr": 0.004,
        "dense_lr": 0.003,
        "staleness_d": 6.0,
        "patience": 3,
        "refit": True,
    },
    "evaluate": {"num_bootstrap": 500},
    "baselines": {"names": ["popularity", "recent_popularity", "recent_item_knn", "als", "ease"]},
    "export": [f"lancedb:{_STORE}"],
}


@dataclass(frozen=True)
class DemoResult:
    """Where everything is.

    Attributes:
        metrics: contents of metrics.json.
        answer: what the store recommends to a few users, what they had left out.
    """

    metrics: dict[str, Any]
    answer: pl.DataFrame
    report: Path
    store: Path


def run_demo(
    out: Path,
    *,
    log: SyntheticLog | None = None,
    device: str = "auto",
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> DemoResult:
    """Generate, train, judge, export, and ask the store.

    Args:
        out: new or empty folder; gets ``data`` and ``run``.
        log: to run on instead of a generated one of some 94,000 rows.
        on_event: gets the events of the run; see ``run.train_run``.

    Raises:
        ConfigError: ``out`` holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder; choose another with --out")
    emit = on_event or (lambda event: None)
    emit({"kind": "stage", "name": "generate a log"})
    log = log or generate_log(seed=1)
    log.write(out / "data")
    tables = {name: str(out / "data" / f"{name}.parquet") for name in ("events", "users", "items")}
    run = train_run(
        parse_config(_CONFIG | {"data": tables}, source="demo"),
        out / "run",
        device=device,
        on_event=on_event,
    )
    store = run / _STORE
    asked = log.users["user_id"].head(3)
    answer = recommend_from_store(f"lancedb:{store}", asked, k=5, seen=log.events)
    return DemoResult(read_json(run / METRICS), answer, run / "report.html", store)
