"""Rankings as tables in the caller's ids: users to items, and items to items."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recclr.data.log import Csr
from recclr.data.prepared import PreparedLog
from recclr.data.vocabulary import Vocabulary
from recclr.distributed import ALONE, Ranks
from recclr.errors import ConfigError, DataError
from recclr.keeping import digest_of
from recclr.ranking import Ranker, TopK
from recclr.similarity import as_candidates, as_queries
from recclr.topk import EmbeddingRanker, top_k

_USERS = 65_536


def recommend(
    prepared: PreparedLog,
    ranker: Ranker,
    users: pl.Series | None = None,
    *,
    k: int = 10,
    items: pl.Series | None = None,
    keep_seen: bool = False,
    ranks: Ranks = ALONE,
) -> pl.DataFrame:
    """The best items of each user.

    Args:
        users: raw ids; each is answered once, in order of first appearance. A user that is not
            known gets the ranking for an empty history. None: every user with a train interaction.
        k: items per user; fewer rows where the candidates run out.
        items: raw ids to choose from; None for the whole corpus.
        keep_seen: also recommend items the user has in train.
        ranks: who share the users, all of which call this; all of them get the whole result.

    Returns:
        user_id (as given, else as read), item_id (as read), rank (Int32 from 1), score (Float32,
        larger is better); by user, then rank. No rows for no users.

    Raises:
        ConfigError: k below 1. DataError: an id of ``items`` is not known, or ids of another type.
    """
    _require_positive(k)
    subset = None if items is None else torch.unique(_known(prepared.items, items, "item"))
    if users is None:
        idx = torch.from_numpy(np.flatnonzero(prepared.users.counts > 0))
        ids = prepared.users.decode(idx.numpy())
    else:
        ids = users.unique(maintain_order=True).drop_nulls()
        if ids.dtype == pl.Null:
            # An empty list has no type of its own.
            ids = ids.cast(prepared.users.ids.dtype)
        idx = torch.from_numpy(prepared.users.encode(ids)).long()
        idx = torch.where(idx < 0, len(prepared.users), idx)
    _require_same(ranks, idx, subset)
    histories = None if keep_seen else _histories(prepared)
    # Nobody gets more than there is, which bounds the memory.
    width = max(1, min(k, len(prepared.items) if subset is None else len(subset)))

    def rank(rows: Tensor) -> TopK:
        seen = None if histories is None else histories.take(idx[rows])
        return ranker.top_k(idx[rows], width, seen=seen, items=subset)

    return _table(rank, ids.rename("user_id"), prepared.items, ranks)


def similar(
    prepared: PreparedLog,
    ranker: EmbeddingRanker,
    items: pl.Series | None = None,
    *,
    k: int = 10,
    ranks: Ranks = ALONE,
) -> pl.DataFrame:
    """The items whose embeddings point the same way (cosine), the item itself left out; the nearest
    ones under Euclidean similarity.

    Args:
        items: raw ids to look up, each answered once; None for the whole corpus.
        k: items per item; fewer rows where the corpus is smaller.
        ranks: see ``recommend``.

    Returns:
        item_id, similar_id (as read), rank (Int32 from 1), score (Float32: the cosine, or minus the
        squared distance); by item, then rank. No rows for no items.

    Raises:
        ConfigError: k below 1. DataError: an id is not known, or ids of another type.
    """
    _require_positive(k)
    _, own = ranker.own_vectors()
    # Dot product ranks users' items; of two items it would say more of their lengths.
    among = "euclidean" if ranker.similarity == "euclidean" else "cosine"
    queries, vectors = as_queries(own, among), as_candidates(own, among)
    if items is None:
        idx = torch.arange(len(prepared.items))
    else:
        idx = _known(prepared.items, items.unique(maintain_order=True), "item")
    _require_same(ranks, idx, None)
    ids = prepared.items.decode(idx.numpy()).rename("item_id")

    def rank(rows: Tensor) -> TopK:
        itself = Csr(torch.arange(len(rows) + 1), idx[rows].to(torch.int32))
        return top_k(queries[idx[rows]], vectors, min(k, len(vectors)), seen=itself)

    table = _table(rank, ids.rename("user_id"), prepared.items, ranks)
    return table.rename({"item_id": "similar_id"}).rename({"user_id": "item_id"})


def _require_same(ranks: Ranks, idx: Tensor, among: Tensor | None) -> None:
    """Each rank answers a part of the rows, so all must have been asked for the same."""
    if ranks.size > 1:
        asked = {"idx": idx} if among is None else {"idx": idx, "among": among}
        ranks.agree({"the ids that are asked for": digest_of(asked)})


def _histories(prepared: PreparedLog) -> Csr:
    """Train items per user, and an empty row for users that are not known."""
    return prepared.tensors.train.user_items(len(prepared.users) + 1)


def _known(vocabulary: Vocabulary, ids: pl.Series, what: str) -> Tensor:
    idx = torch.from_numpy(vocabulary.encode(ids)).long()
    missing = ids.filter(pl.Series((idx < 0).numpy()))
    if len(missing):
        shown = ", ".join(repr(value) for value in missing.head(3).to_list())
        raise DataError(
            f"{len(missing):,} of {len(ids):,} {what} ids are not known to this model, for example "
            f"{shown}; it knows {len(vocabulary):,}, for example {vocabulary.ids[0]!r}"
        )
    return idx


def _table(
    rank: Callable[[Tensor], TopK], ids: pl.Series, items: Vocabulary, ranks: Ranks
) -> pl.DataFrame:
    """What ``rank`` gives for rows 0 to ``len(ids)`` - 1, some at a time, each rank a part of them.

    Args:
        rank: of rows int64 [n]; also of none, which are as wide as all others.
        ids: [rows], named as their column.
    """
    parts = []
    for rows in torch.split(torch.arange(len(ids)), _USERS * ranks.size):
        first, last = ranks.part(len(rows))
        own, counts = rank(rows[first:last]), ranks.counts(len(rows))
        found = TopK(
            ranks.gather(own.item_idx, counts, "the ranked items"),
            ranks.gather(own.scores, counts, "their scores"),
        )
        parts.append(_rows(found, ids.gather(rows.numpy()), items))
    return pl.concat(parts)


def _rows(found: TopK, ids: pl.Series, items: Vocabulary) -> pl.DataFrame:
    rows, ranks = (found.item_idx >= 0).nonzero(as_tuple=True)
    return pl.DataFrame(
        {
            ids.name: ids.gather(rows.numpy()),
            "item_id": items.decode(found.item_idx[rows, ranks].numpy()).rename("item_id"),
            "rank": pl.Series((ranks + 1).numpy(), dtype=pl.Int32),
            "score": found.scores[rows, ranks].numpy(),
        }
    )


def _require_positive(k: int) -> None:
    if k < 1 or k != int(k):
        raise ConfigError(f"k must be whole and at least 1, found {k}")
