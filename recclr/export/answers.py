"""Recommendations straight from a store, as a serving process would make them."""

from __future__ import annotations

import polars as pl
import torch

from recclr.data.log import Csr
from recclr.data.vocabulary import Vocabulary
from recclr.errors import ConfigError, DataError
from recclr.export.exporting import open_store
from recclr.export.store import Store
from recclr.export.targets import Target


def recommend_from_store(
    target: str | Target | Store,
    users: pl.Series,
    k: int = 10,
    *,
    seen: pl.DataFrame | None = None,
    name: str = "catalogue",
) -> pl.DataFrame:
    """The best items of each user, from nothing but the store.

    Args:
        target: ``KIND:DIR``, or a store that is open.
        users: raw ids; each is answered once, in order of first appearance, nulls are dropped.
            A user the store does not know gets the ranking of unknown users.
        k: items per user; fewer rows where the items run out.
        seen: user_id and item_id of what to leave out, for example the events of train.

    Returns:
        user_id (as asked for), item_id (type as exported), rank (from 1), score; by user, then
        rank.

    Raises:
        ConfigError: k below 1. DataError: ids of another type, or ``seen`` lacks a column.
        StoreError: nothing was exported there, or it is damaged.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1, found {k}")
    store = target if isinstance(target, Store) else open_store(target, name)
    known = users.drop_nulls()
    # Without any id there is no type of the caller's own.
    asked = Vocabulary.of(known if len(known) else known.cast(store.manifest.user_id_type))
    left_out = None if seen is None else _rows(store, asked, seen)
    found = store.nearest(store.user_vectors(asked.ids), k, seen=left_out)
    rows, ranks = (found.item_idx >= 0).nonzero(as_tuple=True)
    return pl.DataFrame(
        {
            "user_id": asked.decode(rows.numpy()),
            "item_id": store.items.decode(found.item_idx[rows, ranks].numpy()),
            "rank": pl.Series((ranks + 1).numpy(), dtype=pl.Int32),
            "score": found.scores[rows, ranks].numpy(),
        }
    )


def _rows(store: Store, asked: Vocabulary, seen: pl.DataFrame) -> Csr:
    """Item rows to leave out per user asked for; ids the store lacks are passed over."""
    missing = {"user_id", "item_id"} - set(seen.columns)
    if missing:
        raise DataError(f"seen: expected columns user_id and item_id, found {seen.columns}")
    user_rows = torch.from_numpy(asked.encode(seen["user_id"]))
    item_rows = torch.from_numpy(store.items.encode(seen["item_id"]))
    known = (user_rows >= 0) & (item_rows >= 0)
    return Csr.from_pairs(user_rows[known], item_rows[known], len(asked))
