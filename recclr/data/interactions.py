"""``Log``: clean interactions beside the tables of users and items."""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import polars as pl

from recclr.data.dealing import in_order
from recclr.data.filters import StepCount, decay_weights, in_log_order
from recclr.data.ids import align_ids
from recclr.data.spill import Disk, by_stretches
from recclr.errors import ConfigError, DataError
from recclr.settings import DataSettings, SplitSettings

if TYPE_CHECKING:
    from recclr.data.split import Split


@dataclass(frozen=True, eq=False, repr=False)
class Log:
    """Who took what, and when: immutable, checked, in raw ids.

    Attributes:
        events: ``user_id``, ``item_id`` (integers or strings as they came, never null),
            ``timestamp`` (Int64 seconds UTC) where the log has time, ``weight`` (Float32, above 0)
            where rows weigh differently. With time, in order of (time, user, item); without, as
            in the files.
        users, items: one row per ``user_id`` / ``item_id`` (of the same type as in the events),
            with the other columns as read; None where not given. May lack ids of the events and
            hold others.
        settings: how the log was read.
        steps: rows that each step was given and left, in order.
        quarantine: the bad rows that were dropped, with ``file``, ``row`` and ``reason``.
        notes: what was found and nobody refused, one sentence each.
        explicit: rows of event types that are negatives of their user, in the columns of the
            events; None where none were asked for. All parts of a split have all of them.
        disk: where the events lie if memory has no room for them, and what is made of them goes;
            None: in memory.
    """

    events: pl.DataFrame
    users: pl.DataFrame | None
    items: pl.DataFrame | None
    settings: DataSettings
    steps: tuple[StepCount, ...] = ()
    quarantine: pl.DataFrame = field(default_factory=pl.DataFrame)
    notes: tuple[str, ...] = ()
    explicit: pl.DataFrame | None = None
    disk: Disk | None = None

    def __len__(self) -> int:
        return self.events.height

    def __repr__(self) -> str:
        size = f"{self.num_users:,} users, {self.num_items:,} items, {len(self):,} events"
        time = "no time"
        if self.has_time and len(self):
            first, last = self.events["timestamp"][0], self.events["timestamp"][-1]
            time = f"{_minute(first)} to {_minute(last)} UTC"
        tables = [name for name in ("users", "items") if getattr(self, name) is not None]
        beside = f", with tables of {' and '.join(tables)}" if tables else ""
        return f"Log({size}, {time}{beside})"

    @cached_property
    def num_users(self) -> int:
        """Distinct users in the events."""
        # In order, since polars otherwise sorts a copy of integers.
        return len(self.events["user_id"].unique(maintain_order=True))

    @cached_property
    def num_items(self) -> int:
        """Distinct items in the events; the table of items may hold more."""
        return len(self.events["item_id"].unique(maintain_order=True))

    @property
    def has_time(self) -> bool:
        return "timestamp" in self.events.columns

    @property
    def whereabouts(self) -> list[str]:
        """What people should know of where the rows lie: a sentence, or none of rows in memory.

        No note, since it says nothing of the rows, and another machine may have the memory.
        """
        if self.disk is None:
            return []
        return [
            f"the rows are read piece by piece and lie in files without a name in "
            f"{self.disk.folder} (data.resident)"
        ]

    @property
    def bad_rows(self) -> dict[str, int]:
        """Dropped bad rows by reason; empty where there were none."""
        if not self.quarantine.height:
            return {}
        return dict(sorted(Counter(self.quarantine["reason"].to_list()).items()))

    def with_events(self, events: pl.DataFrame) -> Log:
        """The same log with other rows (of the same columns, in log order)."""
        return replace(self, events=events)

    def concat(self, other: Log) -> Log:
        """The rows of both, in log order; such as train + validation before a refit.

        Weights absent on one side count 1. Tables, settings and notes are those of ``self``.

        Raises:
            ConfigError: only one of the two has time.
        """
        if self.has_time != other.has_time:
            raise ConfigError("a log with time and one without cannot be joined")
        mine, theirs = align_logs([self, other])
        frames = [mine.events, theirs.events]
        if any("weight" in frame.columns for frame in frames):
            one = pl.lit(1.0, dtype=pl.Float32).alias("weight")
            frames = [f if "weight" in f.columns else f.with_columns(one) for f in frames]
        frames = [frame.select(frames[0].columns) for frame in frames]
        if not self.has_time or _one_after_the_other(*frames):
            joined = pl.concat(frames)
        elif self.disk is not None:
            joined = in_order(frames, self.disk, heavy_first=False)
        else:
            joined = in_log_order(pl.concat(frames), heavy_first=False)
        return mine.with_events(joined)

    def split(self, settings: SplitSettings | None = None, seed: int | None = None) -> Split:
        """Hold out validation and test; ``seed`` overrides ``settings.seed``. See ``split``."""
        from recclr.data.split import split_log

        return split_log(self, settings or SplitSettings(), seed=seed)

    def split_by_time(
        self, *, valid: float = 0.1, test: float = 0.1
    ) -> tuple[Log, Log | None, Log | None]:
        """Train, validation and test by global time; a share of 0 gives None.

        Args:
            valid: share of rows, the last but ``test``.
            test: share of rows, the last.
        """
        try:
            settings = SplitSettings(by="time", valid=valid, test=test)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        split = self.split(settings)
        return split.train, split.valid, split.test


def _one_after_the_other(earlier: pl.DataFrame, later: pl.DataFrame) -> bool:
    """Whether two parts in log order need no sort: a large log would be there twice."""
    if not earlier.height or not later.height:
        return True
    return bool(earlier["timestamp"][-1] < later["timestamp"][0])


def _minute(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M")


def apply_decay(log: Log, half_life_d: float | None) -> Log:
    """Halve the weight of each row for every so many days before the last row.

    For **train rows only**, and after splitting, since the last row sets the clock: whoever
    prepares a log for training calls it, with ``log.settings.decay_half_life_d``, on exactly the
    rows that are trained on (train, or train + validation at a refit). Reading and splitting never
    do, so that weights do not decay twice.

    Args:
        log: the train rows.
        half_life_d: days; None returns the log as it is.

    Raises:
        ConfigError: the log has no time.
    """
    if half_life_d is None:
        return log
    last = log.events["timestamp"][-1] if log.has_time and len(log) else None

    def decayed(rows: pl.DataFrame) -> pl.DataFrame:
        return decay_weights(rows, half_life_d, last=last)

    return log.with_events(by_stretches(log.events, decayed, log.disk))


def require_trainable(log: Log) -> None:
    """Refuse a log that no retrieval model can learn from.

    Raises:
        DataError: fewer than two users or two items in the events.
    """
    for count, what in ((log.num_users, "user"), (log.num_items, "item")):
        if count < 2:
            raise DataError(
                f"the events to train on hold {count} {what}{'' if count == 1 else 's'} in "
                f"{len(log):,} rows; a retrieval model needs at least 2 users and 2 items; check "
                f"data.columns.{what} and the steps before ({_told(log.steps)})"
            )


def _told(steps: tuple[StepCount, ...]) -> str:
    return ", ".join(f"{s.name}: {s.rows_in:,} to {s.rows_out:,} rows" for s in steps) or "none"


def align_logs(logs: list[Log]) -> list[Log]:
    """Give the ids of several logs, and of their tables, one type per kind of id."""
    for key, name in (("user_id", "users"), ("item_id", "items")):
        columns: dict[str, pl.Series] = {}
        for number, log in enumerate(logs):
            columns[f"{log.settings.events} ({number})"] = log.events[key]
            table = getattr(log, name)
            if table is not None:
                columns[f"the table of {name} ({number})"] = table[key]
        dtypes = {series.dtype for series in columns.values()}
        if len(dtypes) > 1:
            few = {label: ids.unique(maintain_order=True) for label, ids in columns.items()}
            dtype = next(iter(align_ids(few).values())).dtype
            logs = [_with_id_type(log, key, name, dtype) for log in logs]
    return logs


def _with_id_type(log: Log, key: str, name: str, dtype: pl.DataType) -> Log:
    cast = pl.col(key).cast(dtype)
    if log.events[key].dtype != dtype:
        events = by_stretches(log.events, lambda rows: rows.with_columns(cast), log.disk)
        log = replace(log, events=events)
    if log.explicit is not None:
        log = replace(log, explicit=log.explicit.with_columns(cast))
    if name == "users" and log.users is not None:
        return replace(log, users=log.users.with_columns(cast))
    if name == "items" and log.items is not None:
        return replace(log, items=log.items.with_columns(cast))
    return log
