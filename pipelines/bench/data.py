"""Logs to measure on: Gowalla's where it is at hand, generated ones of any size, and features."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recclr.data.log import Csr, DenseColumn, EncodedLog, FeatureTable, Prepared, RaggedColumn
from recclr.settings import FeatureSettings, HistorySettings, TowerSettings

_NUM_TAGS, _MAX_TAGS = 2_000, 5
HISTORY_LENGTH = 50


@dataclass(frozen=True)
class LogSpec:
    """Which log: read from ``path`` (Parquet: user_id, item_id) or, without one, generated."""

    num_users: int
    num_items: int
    num_rows: int
    path: str | None = None

    def __str__(self) -> str:
        sizes = f"{self.num_users:,} users, {self.num_items:,} items, {self.num_rows:,} rows"
        return f"{Path(self.path).parent.name if self.path else 'generated'}: {sizes}"


def gowalla() -> LogSpec:
    """Gowalla's train rows under RECCLR_DATA, or a generated log of their size."""
    folder = Path(os.environ.get("RECCLR_DATA", "../shared/data")) / "gowalla-lightgcn"
    path = folder / "interactions_train.parquet"
    return LogSpec(29_858, 40_981, 810_128, str(path.resolve()) if path.is_file() else None)


def make_log(spec: LogSpec) -> EncodedLog:
    """The log on the CPU. A generated one has uniform users and items of falling popularity."""
    if spec.path is not None:
        import pyarrow.parquet as pq

        table = pq.read_table(spec.path, columns=["user_id", "item_id"])
        users, items = (torch.tensor(table[name].to_numpy()).int() for name in table.column_names)
        return EncodedLog(users, items, spec.num_users, spec.num_items)
    return _drawn(spec, (spec.num_rows,), torch.Generator().manual_seed(0))


def make_pieces(spec: LogSpec, length: int) -> Iterator[EncodedLog]:
    """A generated log as ``make_log`` has it, piece by piece, so that it need not fit into memory.

    The draws of a piece follow from its number, so the same ``length`` gives the same log.
    """
    for number, start in enumerate(range(0, spec.num_rows, length)):
        size = (min(length, spec.num_rows - start),)
        draws = torch.Generator().manual_seed(number)
        yield _drawn(spec, size, draws)


def _drawn(spec: LogSpec, size: tuple[int], draws: torch.Generator) -> EncodedLog:
    users = torch.randint(spec.num_users, size, generator=draws, dtype=torch.int32)
    # The square of a uniform draw: the first percent of the items gets a tenth of the rows.
    points = torch.rand(size, generator=draws, dtype=torch.float64).square_()
    return EncodedLog(users, points.mul_(spec.num_items).int(), spec.num_users, spec.num_items)


def ids_only(log: EncodedLog) -> tuple[Prepared, TowerSettings, TowerSettings]:
    """The log without features, and both towers' settings."""
    prepared = Prepared(log, FeatureTable(log.num_users), FeatureTable(log.num_items))
    return prepared, TowerSettings(), TowerSettings()


def with_features(log: EncodedLog) -> tuple[Prepared, TowerSettings, TowerSettings]:
    """Items with one to five tags and two numbers, users with their history; settings of both."""
    draws = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, _MAX_TAGS + 1, (log.num_items,), generator=draws)
    rows = torch.arange(log.num_items).repeat_interleave(lengths)
    tags = torch.rand(len(rows), generator=draws).square_().mul_(_NUM_TAGS).int()
    columns = {
        "tags": RaggedColumn(Csr.from_pairs(rows, tags, log.num_items), _NUM_TAGS),
        "numbers": DenseColumn(torch.randn(log.num_items, 2, generator=draws)),
    }
    prepared = Prepared(log, FeatureTable(log.num_users), FeatureTable(log.num_items, columns))
    item = TowerSettings(
        features={
            "tags": FeatureSettings(kind="multi_hot"),
            "numbers": FeatureSettings(kind="numeric"),
        }
    )
    return prepared, TowerSettings(history=HistorySettings(length=HISTORY_LENGTH)), item


def write_arrays(spec: LogSpec, folder: Path) -> dict[str, Any]:
    """The log as two .npy files, which programs without recclr can read; what they are told."""
    log = make_log(spec)
    paths = {name: str(folder / f"{name}.npy") for name in ("users", "items")}
    np.save(paths["users"], log.user_idx.numpy())
    np.save(paths["items"], log.item_idx.numpy())
    return {"num_users": spec.num_users, "num_items": spec.num_items} | paths
