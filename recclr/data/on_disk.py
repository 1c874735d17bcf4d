"""What ``clean`` does with rows in memory, for a log that does not fit: the same rows, on the disk.

A log is checked piece by piece and put into parts by a hash of the user. Whatever a step asks of a
user's rows is then asked of one part at a time, by the functions that are used in memory; the
k-core goes over all parts until nothing changes. Since parts are in order by themselves, the whole
is sorted a range of time after another. A row so goes through three files or four, each of which is
removed with its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import polars as pl

from recclr.data.check import CleanEvents, PiecesSeen, check_events
from recclr.data.clean import capped, core_setting, one_row_per_pair
from recclr.data.dealing import ROW, dealt_by_user, in_order
from recclr.data.filters import Steps, core_rows, refuse_unknown_events
from recclr.data.pieces import ParquetPieces
from recclr.data.spill import Disk
from recclr.data.times import TimesSeen
from recclr.settings import DataSettings


def clean_on_disk(
    pieces: ParquetPieces,
    settings: DataSettings,
    disk: Disk,
    *,
    users: pl.DataFrame | None = None,
    items: pl.DataFrame | None = None,
) -> CleanEvents:
    """As ``clean.filter_events`` of ``check_events``: the same rows in the same order, mapped.

    Args:
        disk: where they are put. users, items: see ``check_events``.

    Raises:
        ConfigError, DataError: as those two say. StoreError: no space.
    """
    seen = PiecesSeen(TimesSeen())

    def dealt() -> list[pl.DataFrame]:
        checked = _checked(pieces, settings, disk, users, items, seen)
        return dealt_by_user(checked, pieces.num_rows, disk)

    parts = dealt()
    if seen.times.misread:
        # What a later piece holds says how an earlier one is to be read, which is rare.
        del parts
        seen = PiecesSeen(seen.times.again())
        parts = dealt()
    seen.refuse(settings)
    steps = Steps(seen.steps.counts, in_pieces=True)
    core = core_setting(settings)
    parts = _part_by_part(
        parts, disk, lambda part: _of_users(part, settings, steps, last=core is None)
    )
    steps.refuse_empty()
    if core is not None:
        before = _num_rows(parts)
        parts = _core(parts, settings, disk)
        steps.record("k_core", before, _num_rows(parts), setting=core)
        steps.refuse_empty()
        parts = _part_by_part(parts, disk, lambda part: capped(part, settings, steps))
        steps.refuse_empty()
    frame = in_order(parts, disk, heavy_first=settings.deduplicate == "first")
    return CleanEvents(frame, steps.counts, seen.quarantine, list(seen.notes))


def _checked(
    pieces: ParquetPieces,
    settings: DataSettings,
    disk: Disk,
    users: pl.DataFrame | None,
    items: pl.DataFrame | None,
    seen: PiecesSeen,
) -> Iterator[pl.DataFrame]:
    """Canonical rows of each piece, numbered through."""
    done, kinds = 0, pl.DataFrame(schema={"_event": pl.String})
    for table in pieces.tables(disk.stretch):
        checked = check_events(table, settings, users=users, items=items, pieces=seen)
        frame = checked.frame
        if "timestamp" not in frame.columns:
            numbers = pl.int_range(done, done + frame.height, dtype=pl.Int64, eager=True)
            frame = frame.with_columns(numbers.alias(ROW))
            done += frame.height
        elif "_fraction" not in frame.columns:
            # Some pieces may have fractions of seconds while others have none.
            frame = frame.with_columns(pl.lit(0, pl.Int64).alias("_fraction"))
        unused = {"_missing_time"}
        if settings.event_weights:
            frame = frame.with_columns(pl.col("_event").cast(pl.String))
            kinds = pl.concat([kinds, frame.select("_event").unique()]).unique()
        else:
            unused.add("_event")
        yield frame.select(sorted(set(frame.columns) - unused))
    if settings.event_weights:
        refuse_unknown_events(kinds, settings.event_weights)


def _of_users(
    part: pl.DataFrame, settings: DataSettings, steps: Steps, *, last: bool
) -> pl.DataFrame:
    """The steps on all rows of some users; ``last``: there is no k-core between them."""
    frame = one_row_per_pair(part, settings, steps)
    frame = frame.select(name for name in frame.columns if name != "_event")
    return capped(frame, settings, steps) if last else frame


def _part_by_part(
    parts: list[pl.DataFrame], disk: Disk, change: Callable[[pl.DataFrame], pl.DataFrame]
) -> list[pl.DataFrame]:
    """What ``change`` makes of each part; the list is emptied, so that their files go at once."""
    done = []
    while parts:
        done.append(disk.written([change(parts.pop(0))]))
    return done


def _num_rows(parts: Sequence[pl.DataFrame]) -> int:
    return sum(part.height for part in parts)


def _core(parts: list[pl.DataFrame], settings: DataSettings, disk: Disk) -> list[pl.DataFrame]:
    """The rows of the k-core; the list is emptied."""
    items = pl.DataFrame()
    for part in parts:
        items = pl.concat([items, part.select("item_id").unique()], how="diagonal").unique()
    items = items.with_row_index("_number")
    # One file for all parts: each that is mapped keeps a descriptor.
    ends = np.cumsum([part.height for part in parts])
    users, numbers = (np.split(disk.array(int(ends[-1]), np.uint32), ends[:-1]) for _ in range(2))
    for part, of_users, of_items in zip(parts, users, numbers, strict=True):
        of_users[:] = part["user_id"].rank("dense").to_numpy()
        numbered = part.join(items, on="item_id", maintain_order="left")
        of_items[:] = numbered["_number"].to_numpy()
    kept = core_rows(users, numbers, (settings.k_core_user, settings.k_core_item))
    masks = iter(kept)
    return _part_by_part(parts, disk, lambda part: part.filter(pl.Series(next(masks))))
