"""Recommendations out of a store alone, without the run that filled it."""

from __future__ import annotations

import polars as pl
import torch

from recclr.errors import ConfigError
from recclr.export.targets import open_store


def recommend_from_store(
    target: str,
    users: pl.Series,
    *,
    k: int = 10,
    seen: pl.DataFrame | None = None,
    name: str = "catalogue",
) -> pl.DataFrame:
    """The best items of each user, as a service would look them up.

    Args:
        target: ``lancedb:DIR`` or ``parquet:DIR``.
        users: raw ids, each answered once; an id that is not in the store gets the vector of
            unknown users.
        seen: columns ``user_id`` and ``item_id``: pairs to leave out.

    Returns:
        user_id, item_id, rank (from 1), score; by user, then rank.

    Raises:
        ConfigError: k below 1. StoreError: nothing is there, or it cannot answer.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1, found {k}")
    store = open_store(target, name)
    wanted = users.unique(maintain_order=True).drop_nulls()
    found, vectors = store.users(wanted)
    rows = dict(zip(found.to_list(), vectors, strict=True))
    unknown = torch.tensor(store.manifest["unknown_user"])
    had = _seen_by_user(seen)
    tables = []
    for user in wanted.to_list():
        without = had.get(user, set())
        query = rows.get(user, unknown)
        # Asking for so many more that enough are left, whatever the store can filter by.
        ids, scores = store.search(query[None], k + len(without))[0]
        kept = [place for place, item in enumerate(ids.to_list()) if item not in without][:k]
        tables.append(
            pl.DataFrame(
                {
                    "user_id": pl.Series([user] * len(kept), dtype=wanted.dtype),
                    "item_id": ids.gather(kept),
                    "rank": pl.Series(range(1, len(kept) + 1), dtype=pl.Int32),
                    "score": scores[kept].numpy(),
                }
            )
        )
    return pl.concat(tables) if tables else pl.DataFrame()


def _seen_by_user(seen: pl.DataFrame | None) -> dict[object, set[object]]:
    if seen is None:
        return {}
    grouped = seen.group_by("user_id").agg("item_id")
    return {user: set(items) for user, items in grouped.iter_rows()}
