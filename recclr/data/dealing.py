"""Rows of a log on the disk by user, by a mark of their own, and in an order, a part at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recclr.data.filters import in_log_order
from recclr.data.spill import Disk, Spill

ROW = "_row"
"""The place of a row in the whole, where its part has to know it."""
_COLUMNS = ("user_id", "item_id", "timestamp", "weight")
# Files that are open at the same time, at most, two for each part for a while; processes may open
# 1,024 by default.
_MOST_PARTS = 256
# Moments that are looked at for each range of time, so that ranges have about as many rows.
_SAMPLE = 1024


def dealt_by_user(frames: Iterable[pl.DataFrame], num_rows: int, disk: Disk) -> list[pl.DataFrame]:
    """Rows in parts of about ``disk.rows``, all rows of a user in one, in the order they came.

    Args:
        frames: at least one; with ``user_id``. num_rows: of all of them, about.
    """
    num_parts = min(max(1, math.ceil(num_rows / disk.rows)), _MOST_PARTS)
    spills = [Spill(disk) for _ in range(num_parts)]
    part = (pl.col("user_id").hash() % num_parts).cast(pl.UInt32).alias("_part")
    for number, frame in enumerate(frames):
        for spill in spills if number == 0 else ():
            # A part may stay empty, but has the columns.
            spill.append(frame.clear())
        if num_parts == 1:
            spills[0].append(frame)
            continue
        dealt = frame.with_columns(part).partition_by("_part", as_dict=True, include_key=False)
        for (part_number,), rows in dealt.items():
            spills[part_number].append(rows)
    return [spill.mapped() for spill in spills]


def asked_of_users(
    frame: pl.DataFrame,
    ask: Callable[[pl.DataFrame], NDArray[Any]],
    dtype: type[np.generic],
    disk: Disk | None,
) -> NDArray[Any]:
    """What ``ask``, which is given all rows of some users in their order, says of each row.

    Args:
        frame: with ``user_id``. dtype: of what it says. disk: where the frame lies; None: in
            memory, where ``ask`` is given all of it.
    """
    if disk is None:
        return ask(frame)
    parts = dealt_by_user(_numbered(frame, disk), frame.height, disk)
    answers = disk.array(frame.height, dtype)
    while parts:
        part = parts.pop()
        answers[part[ROW].to_numpy()] = ask(part.drop(ROW))
    return answers


def _numbered(frame: pl.DataFrame, disk: Disk) -> Iterator[pl.DataFrame]:
    done = 0
    for rows in disk.stretches(frame):
        yield rows.with_row_index(ROW, done)
        done += rows.height


def cut(
    frame: pl.DataFrame, marks: NDArray[Any], num_parts: int, disk: Disk | None
) -> list[pl.DataFrame]:
    """The rows of each mark from 0 up to ``num_parts`` - 1, in their order.

    Args:
        marks: [rows]. disk: where the frame and so its parts lie; None: in memory.
    """
    if disk is None:
        which = pl.Series(marks)
        return [frame.filter(which == part) for part in range(num_parts)]
    spills, done = [Spill(disk) for _ in range(num_parts)], 0
    for rows in disk.stretches(frame):
        which = pl.Series(marks[done : done + rows.height])
        for part, spill in enumerate(spills):
            spill.append(rows.filter(which == part))
        done += rows.height
    return [spill.mapped() for spill in spills]


def in_order(parts: Sequence[pl.DataFrame], disk: Disk, *, heavy_first: bool) -> pl.DataFrame:
    """All rows as ``filters.in_log_order`` has them, without the columns that begin with ``_``.

    Args:
        parts: each in that order by itself; with ``_row``, the place in the files, where there is
            no time.
    """
    timed = "timestamp" in parts[0].columns
    key = "timestamp" if timed else ROW
    ranges = in_ranges(parts, key, disk)
    # The order that ``check`` gives them.
    names = [name for name in _COLUMNS if name in parts[0].columns]

    def ordered(rows: pl.DataFrame) -> pl.DataFrame:
        rows = in_log_order(rows, heavy_first=heavy_first) if timed else rows.sort(ROW)
        return rows.select(names)

    return disk.written(map(ordered, ranges))


def in_ranges(parts: Sequence[pl.DataFrame], key: str, disk: Disk) -> Iterator[pl.DataFrame]:
    """Rows in ranges of a column, one after the other, of about ``disk.rows`` each.

    Args:
        parts: rising in ``key`` (Int64), each. Rows of one value are in one range, in the order of
            the parts, however many there are.
    """
    bounds = _bounds([part[key] for part in parts], disk.rows)
    ends = [[0, *part[key].search_sorted(bounds, side="left"), part.height] for part in parts]
    for number in range(len(bounds) + 1):
        yield pl.concat(
            [part[at[number] : at[number + 1]] for part, at in zip(parts, ends, strict=True)],
            rechunk=False,
        )


def _bounds(rising: Sequence[pl.Series], rows: int) -> pl.Series:
    """Values (Int64, rising) that cut all into ranges of about ``rows``, from a sample of each."""
    total = sum(map(len, rising))
    num_ranges = max(1, math.ceil(total / rows))
    every = max(1, total // (_SAMPLE * num_ranges))
    sample = np.sort(pl.concat([each.gather_every(every) for each in rising]).to_numpy())
    at = np.arange(1, num_ranges) * len(sample) // num_ranges
    return pl.Series(np.unique(sample[at]), dtype=pl.Int64)
