"""What users were shown and did not take, or refused, as lists of items that are negatives."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from recclr.data.interactions import Log
from recclr.data.log import Csr, EncodedLog
from recclr.data.vocabulary import Vocabulary


def explicit_lists(
    train: Log, encoded: EncodedLog, users: Vocabulary, items: Vocabulary
) -> tuple[Csr, dict[str, int]]:
    """Negatives of each user, each item once, rising; ``num_users`` rows.

    Left out are rows of users or items that the vocabulary lacks; rows later than the last train
    row, where the log has time (so that nothing of the held-out period gets in when the split is by
    time; with other splits a row counts whatever its user did before it); and items that the user
    has in train.

    Args:
        train: with ``explicit``. encoded: its rows.

    Returns:
        The lists; how many rows there were in time and how many distinct pairs came of them.
    """
    rows = train.explicit
    assert rows is not None
    if train.has_time and "timestamp" in rows.columns:
        rows = rows.filter(pl.col("timestamp") <= train.events["timestamp"].max())
    user_idx = torch.from_numpy(_encoded(rows["user_id"], users)).long()
    item_idx = torch.from_numpy(_encoded(rows["item_id"], items)).long()
    inside = (user_idx >= 0) & (item_idx >= 0)
    pairs = torch.unique(user_idx[inside] * len(items) + item_idx[inside])
    for taken in encoded.stretches():
        keys = taken.user_idx.long() * len(items) + taken.item_idx
        pairs = pairs[~torch.isin(pairs, keys)]
    lists = Csr.from_pairs(pairs // len(items), pairs % len(items), len(users))
    return lists, {"explicit_rows": rows.height, "explicit_pairs": len(pairs)}


def _encoded(ids: pl.Series, vocabulary: Vocabulary) -> NDArray[np.int32]:
    # An id that is no number is none of a vocabulary of numbers.
    return vocabulary.encode(ids.cast(vocabulary.ids.dtype, strict=False))
