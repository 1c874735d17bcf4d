"""``Log``: clean interactions beside the tables of users and items, and how to read one."""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import polars as pl

from recclr.data.check import check_events, event_columns, filter_events
from recclr.data.files import closest
from recclr.data.filters import StepCount, decay_weights
from recclr.data.ids import align_ids, lookalikes, placeholders, stray_text
from recclr.data.side_tables import read_side_table
from recclr.data.tables import load_table
from recclr.errors import ConfigError, DataError
from recclr.settings import ColumnSettings, DataSettings, SplitSettings

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
    """

    events: pl.DataFrame
    users: pl.DataFrame | None
    items: pl.DataFrame | None
    settings: DataSettings
    steps: tuple[StepCount, ...] = ()
    quarantine: pl.DataFrame = field(default_factory=pl.DataFrame)
    notes: tuple[str, ...] = ()
    explicit: pl.DataFrame | None = None

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
        return self.events["user_id"].n_unique()

    @cached_property
    def num_items(self) -> int:
        """Distinct items in the events; the table of items may hold more."""
        return self.events["item_id"].n_unique()

    @property
    def has_time(self) -> bool:
        return "timestamp" in self.events.columns

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
        joined = pl.concat([frame.select(frames[0].columns) for frame in frames])
        if self.has_time and not _one_after_the_other(*frames):
            joined = joined.sort(["timestamp", "user_id", "item_id"], maintain_order=True)
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
    return log.with_events(decay_weights(log.events, half_life_d))


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
            dtype = next(iter(align_ids(columns).values())).dtype
            logs = [_with_id_type(log, key, name, dtype) for log in logs]
    return logs


def _with_id_type(log: Log, key: str, name: str, dtype: pl.DataType) -> Log:
    cast = pl.col(key).cast(dtype)
    log = replace(log, events=log.events.with_columns(cast))
    if log.explicit is not None:
        log = replace(log, explicit=log.explicit.with_columns(cast))
    if name == "users" and log.users is not None:
        return replace(log, users=log.users.with_columns(cast))
    if name == "items" and log.items is not None:
        return replace(log, items=log.items.with_columns(cast))
    return log


# --- reading --------------------------------------------------------------------------------------


def read(
    events: Any,
    users: Any = None,
    items: Any = None,
    *,
    explicit: Sequence[str] = (),
    **settings: Any,
) -> Log:
    """Read a log.

    Args:
        events: path (file, folder of shards, glob; Parquet, CSV, JSON lines), polars or pandas
            frame, or Arrow table.
        users: table of users, likewise.
        items: table of items, likewise.
        explicit: event types whose rows are negatives of their user, for ``negatives.explicit``.
        **settings: fields of ``DataSettings``, such as ``where={"rating": ">= 7"}``; ``columns``
            may be a dict.

    Raises:
        ConfigError: an unknown setting or a wrong value.
        DataError: the data are refused; the message says what, where and what to do.
    """
    named = {"events": events, "users": users, "items": items}
    frames = {name: source for name, source in named.items() if source is not None}
    labels = {name: _label(source) for name, source in frames.items()}
    return _read(_settings(labels | settings), explicit=explicit, **frames)


def read_log(settings: DataSettings, *, explicit: Sequence[str] = ()) -> Log:
    """Read the log that ``settings`` describe; see ``read``."""
    paths = {name: getattr(settings, name) for name in ("events", "users", "items")}
    given = {name: path for name, path in paths.items() if path}
    return _read(settings, explicit=explicit, **given)


def read_held_out(log: Log, path: str) -> Log:
    """Rows of a file held out by hand, read as ``log`` was but for k-core and caps.

    Those two would drop held-out rows for being few. The tables are those of ``log``.
    """
    settings = replace(log.settings, events=path, k_core_user=0, k_core_item=0, max_per_user=None)
    return _assemble(settings, path, log.users, log.items, [])


def _label(source: Any) -> str:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else "<memory>"


def _settings(values: Mapping[str, Any]) -> DataSettings:
    """``DataSettings`` with types checked, from keyword arguments."""
    from pydantic import TypeAdapter, ValidationError

    known = [known.name for known in fields(DataSettings)]
    for name in values:
        if name not in known:
            near = closest(name, known)
            raise ConfigError(
                f"unknown setting {name!r}" + (f"; did you mean {near!r}?" if near else "")
            )
    columns = values.get("columns")
    plain = {**values, "columns": _plain(columns)} if columns is not None else dict(values)
    try:
        # By way of JSON: there, strict types still let a dict stand for a dataclass.
        return TypeAdapter(DataSettings).validate_json(json.dumps(plain))
    except TypeError as error:
        raise ConfigError(f"settings must be plain numbers, text and dicts: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "settings"
        raise ConfigError(f"{place}: {first['msg']}, found {first['input']!r}") from error


def _plain(columns: Any) -> Any:
    if isinstance(columns, ColumnSettings):
        return {each.name: getattr(columns, each.name) for each in fields(columns)}
    return columns


def _read(
    settings: DataSettings,
    events: Any,
    users: Any = None,
    items: Any = None,
    *,
    explicit: Sequence[str] = (),
) -> Log:
    notes: list[str] = []
    user_table = read_side_table(users, "user", settings, notes)
    item_table = read_side_table(items, "item", settings, notes)
    log = _assemble(settings, events, user_table, item_table, notes)
    return _with_explicit(log, events, explicit) if explicit else log


def _with_explicit(log: Log, events: Any, kinds: Sequence[str]) -> Log:
    """The log with the rows of event types that it leaves out, read as its own but for k-core and
    caps.

    Raises:
        ConfigError: a type has a weight, or none has, so that all rows are positives. DataError: no
        row is of these types.
    """
    weights = log.settings.event_weights
    if not weights or set(kinds) & set(weights):
        raise ConfigError(
            f"explicit = {list(kinds)!r}: expected types that data.event_weights does not name, "
            f"beside those that it does; found {dict(weights)!r} there"
        )
    settings = replace(
        log.settings,
        event_weights=dict.fromkeys(kinds, 1.0),
        deduplicate="first",
        k_core_user=0,
        k_core_item=0,
        max_per_user=None,
    )
    try:
        found = _assemble(settings, events, log.users, log.items, [])
    except DataError as error:
        raise DataError(f"the rows of explicit = {list(kinds)!r}: {error}") from error
    note = f"{len(found):,} pairs of the event types {', '.join(kinds)} are negatives of their user"
    return replace(log, explicit=found.events, notes=(*log.notes, note))


def _assemble(
    settings: DataSettings,
    events: Any,
    users: pl.DataFrame | None,
    items: pl.DataFrame | None,
    notes: list[str],
) -> Log:
    columns = settings.columns
    text = (columns.user, columns.item) if settings.id_type == "string" else ()
    keep = event_columns(settings)
    # Nobody holds what a step was given once it is done: rows are there twice at most, beside some
    # 30 bytes each of hashes and their order.
    clean = filter_events(
        check_events(
            load_table(events, name="events", keep=keep, text=text),
            settings,
            users=users,
            items=items,
        ),
        settings,
    )
    log = Log(
        events=clean.frame,
        users=users,
        items=items,
        settings=settings,
        steps=tuple(clean.steps),
        quarantine=clean.quarantine,
    )
    (log,) = align_logs([log])
    return replace(log, notes=(*notes, *clean.notes, *_id_notes(log)))


def _id_notes(log: Log) -> list[str]:
    notes = []
    for key, name, table in (("user_id", "users", log.users), ("item_id", "items", log.items)):
        used = log.events[key].unique()
        every = used if table is None else pl.concat([used, table[key]]).unique()
        if same := lookalikes(every):
            notes.append(
                f"{key}: {same:,} ids differ from another only in case, outer spaces or Unicode "
                "form; they are kept apart"
            )
        for found, rows in placeholders(log.events[key]).items():
            column = getattr(log.settings.columns, key.removesuffix("_id"))
            notes.append(
                f"{key}: {rows:,} rows have the id {found!r}, which looks like a missing one; if "
                f"it is, leave them out with data.where = {{ {column} = \"!= '{found}'\" }}"
            )
        if strays := stray_text(every):
            notes.append(
                f"{key}: read as text, since {strays:,} of {len(every):,} distinct ids are no "
                "integers"
            )
        if table is not None and (outside := used.is_in(table[key].implode()).not_().sum()):
            notes.append(f"{outside:,} of {len(used):,} {name} in the events are not in the table")
    return notes
