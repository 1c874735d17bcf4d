"""Held-out rows beside those that their users had before: pairs, repeats, histories.

The log may be much larger, and is walked in stretches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recclr.data.grouping import user_items
from recclr.data.log import Csr, EncodedLog


def distinct_pairs(log: EncodedLog) -> Tensor:
    """int64 [P, 2] distinct (user, item) pairs, rising; every item outside the corpus is its own.

    Items outside carry -1 and cannot be told apart here, so each such row counts once.
    """
    users, items = log.user_idx.long(), log.item_idx.long()
    inside = items >= 0
    keys = torch.unique(users[inside] * log.num_items + items[inside])
    known = torch.stack([keys // log.num_items, keys % log.num_items], 1)
    unknown = torch.stack([users[~inside], items[~inside]], 1)
    return torch.cat([known, unknown])


def rows_of_users(log: EncodedLog, users: Tensor) -> EncodedLog:
    """The users and items of the rows of some users (int64, distinct), in their order."""
    # The last place stands for all users beyond them.
    most = int(users.max()) + 1
    wanted = torch.zeros(most + 1, dtype=torch.bool)
    wanted[users] = True
    counts = log.user_counts()
    size = int(counts[users[users < len(counts)]].sum())
    # Filled, not put together from pieces: for a moment they would all be there twice.
    found, done = torch.empty((2, size), dtype=torch.int32), 0
    for rows in log.stretches():
        own = wanted[rows.user_idx.long().clamp(max=most)]
        some = torch.stack([rows.user_idx[own], rows.item_idx[own]])
        found[:, done : done + some.shape[1]] = some
        done += some.shape[1]
    return EncodedLog(found[0], found[1], log.num_users, log.num_items)


def histories(log: EncodedLog, users: Tensor) -> Csr:
    """Items of each of some users (int64 [Q], rising) in log order, Q rows."""
    places = torch.full((int(users.max()) + 1,), -1, dtype=torch.int32)
    places[users] = torch.arange(len(users), dtype=torch.int32)
    # Users whose held-out items were all repeats may have larger numbers than any of these.
    own = places[log.user_idx.clamp(max=len(places) - 1)]
    own[log.user_idx >= len(places)] = -1
    known = own >= 0
    rows = EncodedLog(own[known], log.item_idx[known], len(users), log.num_items)
    return user_items(rows)


def joined(train: EncodedLog, later: EncodedLog) -> EncodedLog:
    """Both logs' pairs, of users and items that have an index in train."""
    known = (later.user_idx < train.num_users) & (later.item_idx >= 0)
    return EncodedLog(
        torch.cat([train.user_idx, later.user_idx[known]]),
        torch.cat([train.item_idx, later.item_idx[known]]),
        train.num_users,
        train.num_items,
    )


def pairs_in(pairs: Tensor, log: EncodedLog) -> Tensor:
    """Bool [P]: pairs that are rows of the log."""
    width = log.num_items + 1
    wanted, order = (pairs[:, 0] * width + pairs[:, 1] + 1).sort()
    found = torch.zeros(len(pairs), dtype=torch.bool)
    if not len(pairs):
        return found
    for rows in log.stretches():
        # In their order, neighbours are looked for near each other.
        keys = (rows.user_idx.long() * width + rows.item_idx.long() + 1).sort().values
        place = torch.searchsorted(wanted, keys).clamp(max=len(wanted) - 1)
        found[place[wanted[place] == keys]] = True
    return torch.empty_like(found).index_copy_(0, order, found)
