"""Pairs of items that the same people had close together: the log that item-to-item models learn.

Items of a user that stand at most ``window`` places apart in the user's history are a pair, in both
directions, weighted down with their distance (item2vec, Barkan & Koenigstein 2016, with weights in
place of a window drawn at random).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from recclr.data.log import Csr, EncodedLog, Groups
from recclr.errors import DataError
from recclr.settings import PairSettings
from recclr.statistics import DAY_S


def co_interactions(log: EncodedLog, settings: PairSettings) -> EncodedLog:
    """Rows (query item, item) as a log whose "users" are the items.

    Known to a query, and so never its negative, are all items it stands beside here, and itself.
    Takes 2 · window · n rows of 20 bytes at most.

    Args:
        log: n train rows in memory, oldest first where there is a time; without one a history is
            in the order of the log. Weights multiply as the root of their product.

    Returns:
        sorted by the time of the later of both events, where there is one.

    Raises:
        DataError: nobody has two different items so close together.
    """
    order = torch.argsort(log.user_idx.long(), stable=True)
    users, items = log.user_idx[order], log.item_idx[order]
    times = None if log.timestamp is None else log.timestamp[order]
    weights = None if log.weight is None else log.weight[order]
    found = []
    for distance in range(1, min(settings.window, max(len(log) - 1, 0)) + 1):
        first = torch.arange(len(order) - distance, device=order.device)
        second = first + distance
        kept = (users[first] == users[second]) & (items[first] != items[second])
        if settings.within_d is not None and times is not None:
            kept &= times[second] - times[first] <= settings.within_d * DAY_S
        first, second = first[kept], second[kept]
        weight = torch.full((len(first),), 0.5 ** ((distance - 1) / settings.half_life))
        weight = weight.to(order.device)
        if weights is not None:
            weight *= (weights[first] * weights[second]).sqrt()
        later = None if times is None else times[second]
        found += [(items[first], items[second], weight, later)]
        found += [(items[second], items[first], weight, later)]
    queries, others, weight, later = _joined(found, log)
    if not len(queries):
        raise DataError(
            'model.mode = "item_item" learns from users who have two different items close '
            "together, and there are none in train; widen model.pairs, or check the user column"
        )
    pairs = EncodedLog(queries, others, log.num_items, log.num_items, later, weight)
    if later is not None:
        pairs = pairs.rows(torch.argsort(later, stable=True))
    known = _known(pairs)
    return replace(pairs, groups=Groups(known_items=known, known_users=known))


def last_items(log: EncodedLog, length: int) -> Csr:
    """The last ``length`` items of each user, oldest first, [num_users] rows."""
    every = log.user_items()
    start = torch.maximum(every.offsets[:-1], every.offsets[1:] - length)
    places = torch.arange(len(every.values), device=every.offsets.device)
    kept = places >= start[every.row_numbers()]
    offsets = torch.nn.functional.pad((every.offsets[1:] - start).cumsum(0), (1, 0))
    return Csr(offsets, every.values[kept])


def _joined(
    found: list[tuple[Tensor, Tensor, Tensor, Tensor | None]], log: EncodedLog
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    none = log.item_idx[:0]
    queries = torch.cat([none, *(part[0] for part in found)])
    others = torch.cat([none, *(part[1] for part in found)])
    weight = torch.cat([none.float(), *(part[2] for part in found)])
    later = [part[3] for part in found if part[3] is not None]
    return queries, others, weight, torch.cat(later) if later else None


def _known(pairs: EncodedLog) -> Csr:
    """What stands beside each item, and the item itself: symmetric, every pair once."""
    size = pairs.num_items
    own = torch.arange(size, device=pairs.item_idx.device)
    every = torch.cat([pairs.user_idx.long() * size + pairs.item_idx, own * size + own])
    every = torch.unique(every)
    return Csr.from_pairs(every // size, every % size, size)
