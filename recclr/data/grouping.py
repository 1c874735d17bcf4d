"""A log's rows by entity, made without holding the log: piece after piece, in passes.

Each pass walks the whole column of entities and keeps the rows of a range of them; the ranges are
cut so that one has about ``_ROWS`` rows. So memory does not grow with the log, but the number of
passes does (25 over 100 M rows, each about as fast as memory is read), and every piece is final and
can be put after the one before. An entity is never cut: one with more rows than that takes more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from recclr.data.log import Csr, EncodedLog

# What may be wanted: fields of ``log.Groups``, the two of known pairs as one.
GROUPS = ("user_items", "known", "user_times", "item_times")
# Keys of (entity, second) are below this, so that no sum of theirs overflows.
MOST_KEYS = 1 << 62
_ROWS = 1 << 22


def grouped(log: EncodedLog, wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Pieces of the wanted groups, each to be put after the earlier ones of its name.

    Args:
        log: in memory or mapped; with time, rising in it.
        wanted: of ``GROUPS``; times of a log without them, or whose keys would overflow, are left
            out.

    Yields:
        ``known_items.offsets`` and the like for fields that are a ``Csr``, else the field's name.
    """
    known = "known_items" if "known" in wanted else None
    items = "user_items" if "user_items" in wanted else None
    yield from _by_entity(
        *(log.user_idx, log.item_idx, log.user_counts(), log.num_items, log.timestamp),
        known=known,
        all_rows=items,
        times="user_times" if "user_times" in wanted else None,
    )
    yield from _by_entity(
        *(log.item_idx, log.user_idx, log.item_counts(), log.num_users, log.timestamp),
        known="known_users" if "known" in wanted else None,
        all_rows=None,
        times="item_times" if "item_times" in wanted else None,
    )


def user_items(log: EncodedLog) -> Csr:
    """As ``EncodedLog.user_items``, in hardly more memory than the result takes."""
    counts = log.user_counts()
    values, done = torch.empty_like(log.item_idx), 0
    for _, _, rows in _stretches(log.user_idx, counts):
        order = log.user_idx[rows].argsort(stable=True)
        values[done : done + len(rows)] = log.item_idx[rows[order]]
        done += len(rows)
    return Csr(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), values)


def time_range(rising: Tensor) -> tuple[int, int]:
    """The first of rising moments, and how many seconds there are from it to the last, and one
    more; (0, 2) of none.
    """
    if not len(rising):
        return 0, 2
    return int(rising[0]), int(rising[-1]) - int(rising[0]) + 2


def time_keys(entity_idx: Tensor, timestamp: Tensor, origin: int, span: int) -> Tensor:
    """int64 [n], rising: entity · span + seconds since ``origin``."""
    keys: Tensor = (entity_idx.long() * span + (timestamp - origin)).sort().values
    return keys


def _by_entity(
    own: Tensor,
    other: Tensor,
    counts: Tensor,
    num_others: int,
    timestamp: Tensor | None,
    *,
    known: str | None,
    all_rows: str | None,
    times: str | None,
) -> Iterator[tuple[str, Tensor]]:
    """The groups of one side, under the given names; None for those not wanted."""
    if timestamp is None or len(counts) * time_range(timestamp)[1] >= MOST_KEYS:
        times = None
    if not (known or all_rows or times):
        return
    for name in filter(None, (known, all_rows)):
        yield f"{name}.offsets", torch.zeros(1, dtype=torch.int64)
    if all_rows:
        yield f"{all_rows}.offsets", counts.cumsum(0)
    num_known = 0
    for low, high, rows in _stretches(own, counts):
        entities, others = own[rows].long(), other[rows]
        if known:
            pairs = torch.unique(entities * num_others + others)
            lengths = torch.bincount(pairs // num_others - low, minlength=high - low)
            yield f"{known}.values", (pairs % num_others).int()
            yield f"{known}.offsets", num_known + lengths.cumsum(0)
            num_known += len(pairs)
        if all_rows:
            yield f"{all_rows}.values", others[entities.argsort(stable=True)]
        if times and timestamp is not None:
            yield times, time_keys(entities, timestamp[rows], *time_range(timestamp))


def _stretches(own: Tensor, counts: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Ranges of entities that cover all, and the rows (int64, rising) of each."""
    ends, low, done = counts.cumsum(0), 0, 0
    while low < len(counts):
        reach = int(torch.searchsorted(ends, done + _ROWS, right=True))
        high = max(low + 1, min(reach, len(counts)))
        yield low, high, _rows_of(own, low, high)
        low, done = high, int(ends[high - 1])


def _rows_of(own: Tensor, low: int, high: int) -> Tensor:
    """int64: rows of the entities ``low`` to ``high`` - 1, rising."""
    found = []
    for start in range(0, len(own), _ROWS):
        part = own[start : start + _ROWS]
        found.append(((part >= low) & (part < high)).nonzero().squeeze(1) + start)
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
