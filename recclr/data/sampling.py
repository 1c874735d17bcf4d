"""Nested samples of the rows of a log: a smaller share is part of every larger one."""

from __future__ import annotations

import numpy as np
import polars as pl

from recclr.data.ids import hash_ids, mix


def sample_of_users(events: pl.DataFrame, share: float, *, seed: int) -> pl.Series:
    """Which rows are in a sample that keeps every user: Boolean [rows].

    Each user keeps ``share`` of the rows, rounded up or down by a hash of (seed, user), and one at
    least; which ones says a hash of (seed, user, item), so that a row's place depends neither on
    other users nor on the order of rows. Where users have few rows the sample is therefore larger
    than ``share`` of all; items may be left without rows.

    Args:
        events: canonical columns. share: above 0, at most 1, which keeps all. seed: at least 0.
    """
    user = hash_ids(events["user_id"], seed + 2)
    row = mix(user ^ hash_ids(events["item_id"], seed + 3))
    part = (mix(user ^ np.uint64(3)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    frame = events.with_columns(pl.Series("_row", row), pl.Series("_part", part))
    # Equal hashes are rows of one pair; the other columns then decide, not the order of rows.
    order = ["_row", *(c for c in ("timestamp", "weight") if c in events.columns)]
    rank = pl.struct(order).rank("ordinal").over("user_id").cast(pl.Int64) - 1
    kept = (pl.len().over("user_id") * share + pl.col("_part")).floor().cast(pl.Int64)
    return frame.select((rank < pl.max_horizontal(kept, pl.lit(1))).alias("kept"))["kept"]
