"""The smallest complete batch job: read, split, fit, evaluate, recommend, export. Copy and change.

    python pipelines/quickstart.py
    python pipelines/quickstart.py --events e.parquet --items i.parquet --out runs/first

Without --events it runs on a generated log. Events need user_id, item_id and timestamp; the tables
of users and items are optional, and their columns become features by type. Leaves behind
recommendations.parquet and a store with both towers' embeddings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import recclr
from recclr.data.synthetic import generate_log


def main(
    events: Annotated[Path | None, typer.Option(help="file, folder of shards or glob")] = None,
    users: Annotated[Path | None, typer.Option(help="table of users")] = None,
    items: Annotated[Path | None, typer.Option(help="table of items")] = None,
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("runs/quickstart"),
    epochs: Annotated[float, typer.Option(help="at most so many; validation picks the best")] = 10,
    k: Annotated[int, typer.Option(help="items per user")] = 20,
) -> None:
    """Run the job and print what came of it."""
    if events is None:
        generate_log(num_users=1_500, num_items=1_000, num_events=40_000).write(out / "data")
        events, users, items = (out / "data" / f"{t}.parquet" for t in ("events", "users", "items"))

    log = recclr.read(events, users, items)
    train, valid, test = log.split_by_time(valid=0.1, test=0.1)
    model = recclr.TwoTower.fit(
        train,
        valid=valid,
        config={
            "user": {"history": {"length": 50, "half_life_d": 30.0}},
            "train": {"batch_size": 1024, "epochs": epochs, "patience": 2},
        },
    )
    print(model.evaluate(test, ks=(10, 20)))

    out.mkdir(parents=True, exist_ok=True)
    model.recommend(k=k).write_parquet(out / "recommendations.parquet")
    print(model.export(f"lancedb:{out / 'store'}"))


if __name__ == "__main__":
    typer.run(main)
