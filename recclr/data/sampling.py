"""Nested samples of the rows of a log: a smaller share is part of every larger one."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recclr.data.by_user import shuffled_by_user
from recclr.data.ids import mix, uniform


def sample_of_users(events: pl.DataFrame, share: float, *, seed: int) -> NDArray[np.bool_]:
    """Which rows are in a sample that keeps every user: bool [rows].

    Each user keeps ``share`` of the rows, rounded up or down by a hash of (seed, user), and one at
    least; which ones says a hash of (seed, user, item), so that a row's place depends neither on
    other users nor on the order of rows. Where users have few rows the sample is therefore larger
    than ``share`` of all; items may be left without rows.

    Args:
        events: canonical columns. share: above 0, at most 1, which keeps all. seed: at least 0.
    """
    ranked, user = shuffled_by_user(events, seed + 2)
    kept = np.floor(ranked.rows * share + uniform(mix(user ^ np.uint64(3))))
    return ranked.in_frame(ranked.place < np.maximum(kept, 1))
