"""Holding out validation and test rows: by time, given files, the last rows, at random, by item.

Every way is independent of the order of rows and files (``leave_last`` without time excepted,
where that order is the time), and cuts rows into parts without losing or repeating one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recclr.data.by_user import ranked_by_user, shuffled_by_user
from recclr.data.dealing import asked_of_users, cut
from recclr.data.ids import hash_ids, mix, uniform
from recclr.data.interactions import Log, align_logs
from recclr.data.overlap import overlaps, sizes
from recclr.data.pairs import rows_in
from recclr.data.reading import read_held_out
from recclr.data.sampling import sample_of_users
from recclr.errors import ConfigError, DataError
from recclr.settings import SplitSettings

Parts = tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]
"""Train, validation and test rows."""


@dataclass(frozen=True, eq=False)
class Split:
    """A log in parts.

    Attributes:
        train: the rows to learn from.
        valid, test: held-out rows; None where none were asked for.
        left_out: train rows that are not in the sample of ``split.train_share``; None for all.
        by: ``time``, ``given``, ``leave_last``, ``random`` or ``items``.
        cutoffs: ``valid`` / ``test`` -> the first second (UTC) of that part; of splits by time.
        counts: per part, ``left_out`` included, ``rows``, ``users``, ``items``, and for held-out
            parts, against train alone (``test`` also against train + validation, under
            ``test_after_refit``): ``unknown_users``, ``unknown_items`` and the ``rows_of_…`` them,
            and ``rows_also_before``, whose (user, item) is in the earlier rows already. With time
            also ``rows_before_train_end``, no later than the last earlier row.
    """

    train: Log
    valid: Log | None
    test: Log | None
    by: str
    cutoffs: dict[str, int] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    left_out: Log | None = None

    def had_before(self, part: str, *, refitted: bool = False) -> Log | None:
        """Rows that users have by ``valid`` or ``test`` and that nothing is fitted on, or None.

        Args:
            refitted: the model of ``test`` was trained on validation as well.
        """
        later = self.valid if part == "test" and not refitted else None
        logs = [log for log in (self.left_out, later) if log is not None]
        return None if not logs else logs[0] if len(logs) == 1 else logs[0].concat(logs[1])


def split_log(log: Log, settings: SplitSettings, *, seed: int | None = None) -> Split:
    """Split as configured.

    Args:
        log: not empty.
        settings: the way and the sizes.
        seed: of the random way; ``settings.seed`` where not given.

    Raises:
        ConfigError: sizes that make no sense for the way.
        DataError: no time to split by, an empty part, or held-out rows that are in train as well.
    """
    if not len(log):
        raise DataError("the log has no rows to split")
    by = settings.by
    if by == "auto":
        by = "time" if log.has_time else "random"
    if seed is not None:
        settings = replace(settings, seed=seed)
    ways: dict[str, Callable[[Log, SplitSettings], Split]] = {
        "time": _by_time,
        "given": _given,
        "leave_last": _leave_last,
        "random": _random,
        "items": _by_items,
    }
    split = ways[by](log, settings)
    _refuse_empty(split, settings)
    if settings.train_share < 1:
        split = _sampled(split, settings)
    counts = {"train": sizes(split.train)}
    if split.left_out is not None:
        counts["left_out"] = sizes(split.left_out)
    return replace(split, counts=counts | overlaps(split.train, split.valid, split.test))


# --- by time --------------------------------------------------------------------------------------


def _by_time(log: Log, settings: SplitSettings) -> Split:
    if not log.has_time:
        raise DataError(
            "split.by = 'time' needs times, and the log has none; name their column in "
            "data.columns.timestamp, or set split.by = 'random' or 'leave_last'"
        )
    parts, cutoffs = cut_by_time(log.events, valid=settings.valid, test=settings.test)
    return _of_parts(log, parts, settings, "time", cutoffs)


def cut_by_time(events: pl.DataFrame, *, valid: float, test: float) -> tuple[Parts, dict[str, int]]:
    """Cut at the moments of the rows at the (1 - valid - test) and (1 - test) points.

    All rows of a moment fall on one side: a part begins with the first row *at* its cut-off, so
    parts may be somewhat larger than asked. A share of 0 gives no rows and no cut-off.

    Args:
        events: with ``timestamp``, sorted by it, not empty.
        valid: share of rows, at least 0.
        test: share of rows, at least 0; together below 1.
    """
    time = events["timestamp"]
    cutoffs: dict[str, int] = {}
    starts = {"valid": events.height, "test": events.height}
    for name, share, held in (("test", test, test), ("valid", valid, valid + test)):
        if share > 0:
            # Rounded first: 5 * (1 - (0.4 + 0.2)) is 1.999..., and a row would change sides.
            row = min(math.floor(round(events.height * (1 - held), 6)), events.height - 1)
            cutoffs[name] = int(time[row])
            starts[name] = int(time.search_sorted(time[row], side="left"))
        elif name == "valid":
            starts["valid"] = starts["test"]
    first, second = starts["valid"], starts["test"]
    parts = events[:first], events[first:second], events[second:]
    return parts, dict(sorted(cutoffs.items(), reverse=True))


# --- per user -------------------------------------------------------------------------------------


def _leave_last(log: Log, settings: SplitSettings) -> Split:
    for name in ("valid", "test"):
        rows = getattr(settings, name)
        if rows != int(rows):
            raise ConfigError(
                f"split.{name} = {rows:g} with split.by = 'leave_last': expected a whole number "
                f"of rows per user (0 for none), for example split.{name} = 1"
            )

    def parts(events: pl.DataFrame) -> NDArray[np.int8]:
        ranked = ranked_by_user(events)
        rank, others = ranked.rows - 1 - ranked.place, ranked.rows - 1
        test = np.minimum(int(settings.test), others)
        valid = np.minimum(int(settings.valid), others - test)
        return ranked.in_frame(_part_of_rank(rank, valid, test))

    return _of_parts(log, _cut_by_user(log, parts), settings, "leave_last", {})


def _random(log: Log, settings: SplitSettings) -> Split:
    parts = _cut_at_random(log, valid=settings.valid, test=settings.test, seed=settings.seed)
    return _of_parts(log, parts, settings, "random", {})


def _cut_at_random(log: Log, *, valid: float, test: float, seed: int) -> Parts:
    return _cut_by_user(log, lambda rows: parts_at_random(rows, valid=valid, test=test, seed=seed))


def _cut_by_user(log: Log, parts: Callable[[pl.DataFrame], NDArray[np.int8]]) -> Parts:
    """Cut as ``parts`` says, which is given all rows of some users."""
    return _cut(log, asked_of_users(log.events, parts, np.int8, log.disk))


def _cut(log: Log, parts: NDArray[np.int8]) -> Parts:
    train, valid, test = cut(log.events, parts, 3, log.disk)
    return train, valid, test


def parts_at_random(
    events: pl.DataFrame, *, valid: float, test: float, seed: int
) -> NDArray[np.int8]:
    """The part of each row: a share of each user's is held out, one at least stays in train.

    A row's place among its user's rows comes from a hash of (seed, user, item), and a user's
    fractional row is rounded up or down by a hash of (seed, user): the expected number of held-out
    rows is the share, also for users with few rows, and rows of other users change nothing.

    Args:
        events: canonical columns.
        valid: share of rows, at least 0.
        test: share of rows, at least 0; together below 1.
        seed: at least 0.

    Returns:
        int8 [rows]: 0 for train, 1 for validation, 2 for test.
    """
    ranked, user = shuffled_by_user(events, seed)
    rows, others = ranked.rows, ranked.rows - 1
    num_test, num_valid = (
        np.floor(rows * share + uniform(mix(user ^ np.uint64(key)))).astype(np.int64)
        for share, key in ((test, 1), (valid, 2))
    )
    num_test = np.minimum(num_test, others)
    num_valid = np.minimum(num_valid, others - num_test)
    return ranked.in_frame(_part_of_rank(ranked.place, num_valid, num_test))


def _part_of_rank(
    rank: NDArray[np.int64],
    valid: NDArray[np.int64] | int,
    test: NDArray[np.int64] | int,
) -> NDArray[np.int8]:
    """The first ``test`` ranks to test (2), the next ``valid`` to validation (1)."""
    held = (rank >= test) & (rank < test + valid)
    return np.where(rank < test, 2, held).astype(np.int8)


# --- by item --------------------------------------------------------------------------------------


def _by_items(log: Log, settings: SplitSettings) -> Split:
    part_of = part_of_items(
        log.events["item_id"], valid=settings.valid, test=settings.test, seed=settings.seed
    )
    stretches = [log.events] if log.disk is None else log.disk.stretches(log.events)
    parts = [
        rows.join(part_of, on="item_id", how="left", maintain_order="left")["part"].to_numpy()
        for rows in stretches
    ]
    return _of_parts(log, _cut(log, np.concatenate(parts)), settings, "items", {})


def part_of_items(ids: pl.Series, *, valid: float, test: float, seed: int) -> pl.DataFrame:
    """The part of each item: a share of them is held out, new to what is trained.

    Which items says a hash of (seed, item); a share that is not 0 rounds up to one item at least.
    Users all of whose items are held out have no row in train.

    Args:
        ids: of all rows, with repeats.
        valid: share of the items, at least 0. test: as well; together below 1. seed: at least 0.

    Returns:
        ``item_id``, each once, and ``part`` (Int8): 0 for train, 1 for validation, 2 for test.
    """
    items = ids.unique(maintain_order=True).sort().to_frame("item_id")
    drawn = pl.struct(pl.Series("_hash", mix(hash_ids(items["item_id"], seed + 4))), "item_id")
    place = drawn.rank("ordinal").cast(pl.Int64) - 1
    num_test, num_valid = (math.ceil(round(items.height * share, 6)) for share in (test, valid))
    rank = items.select(place)
    parts = _part_of_rank(rank.to_series().to_numpy(), num_valid, num_test)
    return items.with_columns(pl.Series("part", parts))


# --- given files ----------------------------------------------------------------------------------


def _given(log: Log, settings: SplitSettings) -> Split:
    assert settings.test_events is not None
    test = _read_given(log, settings.test_events, "test")
    cutoffs: dict[str, int] = {}
    valid: Log | None = None
    if settings.valid_events is not None:
        valid = _read_given(log, settings.valid_events, "valid")
        train, valid, test = align_logs([log, valid, test])
        _refuse_leak(train, valid, "valid", settings.valid_events)
    else:
        train, test = align_logs([log, test])
    _refuse_leak(train, test, "test", settings.test_events)
    if valid is None and settings.valid > 0:
        if settings.valid >= 1:
            raise ConfigError(
                f"split.valid = {settings.valid:g} with split.by = 'given': expected the share of "
                "train rows to cut for validation, below 1, or split.valid_events"
            )
        if train.has_time:
            parts, cutoffs = cut_by_time(train.events, valid=settings.valid, test=0.0)
        else:
            parts = _cut_at_random(train, valid=settings.valid, test=0.0, seed=settings.seed)
        train, valid = train.with_events(parts[0]), train.with_events(parts[1])
    elif valid is not None:
        _refuse_leak(valid, test, "test", settings.test_events)
    return Split(train, valid, test, "given", cutoffs)


def _read_given(log: Log, path: str, name: str) -> Log:
    held = read_held_out(log, path)
    if log.has_time and not held.has_time:
        raise DataError(
            f"split.{name}_events: {path} has no times, {log.settings.events} has; write the "
            "column, or set data.columns.timestamp = '' to leave times out"
        )
    if held.has_time and not log.has_time:
        return held.with_events(held.events.drop("timestamp"))
    return held


def _refuse_leak(before: Log, held: Log, name: str, path: str) -> None:
    """A pair on both sides is a leak, unless repeats are part of the log."""
    if before.settings.deduplicate == "none":
        return
    shared = rows_in(held.events, before.events, before.disk).height
    if shared:
        share = shared / len(held)
        raise DataError(
            f"split.{name}_events: {shared:,} of {len(held):,} (user, item) pairs of {path} "
            f"({share:.1%}) are also in the rows of {before.settings.events}, which makes any "
            "figure on them worthless; take them out of one side, or set data.deduplicate = "
            "'none' where repeats are wanted"
        )


# --- what came out --------------------------------------------------------------------------------


def _of_parts(
    log: Log, parts: Parts, settings: SplitSettings, by: str, cutoffs: dict[str, int]
) -> Split:
    train, valid, test = (log.with_events(part) for part in parts)
    return Split(
        train=train,
        valid=valid if settings.valid > 0 else None,
        test=test if settings.test > 0 else None,
        by=by,
        cutoffs=cutoffs,
    )


def _refuse_empty(split: Split, settings: SplitSettings) -> None:
    parts = {"train": split.train, "validation": split.valid, "test": split.test}
    sizes = {name: len(part) for name, part in parts.items() if part is not None}
    for name, size in sizes.items():
        if size:
            continue
        told = ", ".join(f"{part} {rows:,} rows" for part, rows in sizes.items())
        advice = {
            "time": "too many rows share one moment or the log is too small",
            "leave_last": "no user has rows enough",
            "random": "users have too few rows",
            "given": "the train file is too small for the share",
            "items": "the log has too few items",
        }[split.by]
        raise DataError(
            f"the {name} part is empty (split.by = {split.by!r}: {told}): {advice}; change "
            f"split.valid = {settings.valid:g} or split.test = {settings.test:g}, or split.by"
        )


def _sampled(split: Split, settings: SplitSettings) -> Split:
    log, share = split.train, settings.train_share
    kept = asked_of_users(
        log.events,
        lambda rows: sample_of_users(rows, share, seed=settings.seed),
        np.bool_,
        log.disk,
    )
    left_out, train = map(log.with_events, cut(log.events, kept.view(np.int8), 2, log.disk))
    return replace(split, train=train, left_out=left_out if len(left_out) else None)
