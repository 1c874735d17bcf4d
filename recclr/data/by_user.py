"""Each user's rows in an order: what splits, samples and caps cut by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recclr.data.ids import hash_ids, mix


@dataclass(frozen=True, eq=False)
class Ranked:
    """Rows sorted by user, and within a user.

    Attributes:
        order: [n], rows of the frame. place: int64 [n], of each among its user's, from 0.
        rows: int64 [n], how many its user has.
    """

    order: NDArray[np.unsignedinteger]
    place: NDArray[np.int64]
    rows: NDArray[np.int64]

    def in_frame(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values [n] of the ranked rows, each where its row stands in the frame."""
        placed = np.empty_like(values)
        placed[self.order] = values
        return placed


def ranked_by_user(frame: pl.DataFrame, by: Sequence[str] = ()) -> Ranked:
    """Each user's rows ranked by some columns, equal ones in the order they came in.

    One sort: windows over each user take five times as long.
    """
    order = frame.select(pl.arg_sort_by("user_id", *by, maintain_order=True)).to_series()
    users = frame["user_id"].gather(order)
    starts = np.flatnonzero(users.ne_missing(users.shift()).to_numpy())
    rows = np.diff(np.append(starts, len(order)))
    place = np.arange(len(order)) - np.repeat(starts, rows)
    return Ranked(order.to_numpy(), place, np.repeat(rows, rows))


def shuffled_by_user(events: pl.DataFrame, seed: int) -> tuple[Ranked, NDArray[np.uint64]]:
    """Each user's rows in an order that a hash of (seed, user, item) gives.

    A row's place depends neither on other users nor on the order of rows.

    Args:
        events: canonical columns. seed: at least 0; seed + 1 is taken as well.

    Returns:
        The ranked rows, and for each of them a hash of (seed, user).
    """
    user = hash_ids(events["user_id"], seed)
    row = mix(user ^ hash_ids(events["item_id"], seed + 1))
    # Equal hashes are rows of one pair; the other columns then decide, not the order of rows.
    by = ["_row", *(name for name in ("timestamp", "weight") if name in events.columns)]
    ranked = ranked_by_user(events.with_columns(pl.Series("_row", row)), by)
    return ranked, user[ranked.order]
