"""From a raw table to clean rows: conditions, bad rows, weights, duplicates, k-core, caps.

The order is that of the settings. Conditions come before the check for bad rows, so that
``where = { user_id = "not null" }`` keeps the anonymous rows of a shop from being errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import polars as pl

from recclr.data.files import closest
from recclr.data.filters import (
    StepCount,
    Steps,
    cap_users,
    deduplicate,
    in_log_order,
    k_core,
    weigh_events,
)
from recclr.data.ids import canonical_ids
from recclr.data.tables import Table, require_columns
from recclr.data.times import EARLIEST, latest, read_times
from recclr.data.where import where_masks
from recclr.errors import ConfigError, DataError
from recclr.settings import ColumnSettings, DataSettings

DEFAULT_TIMESTAMP = "timestamp"
_LARGEST = 3.4e38


@dataclass(frozen=True, eq=False)
class CleanEvents:
    """What came through, and what became of the rest.

    Attributes:
        frame: ``user_id``, ``item_id``, ``timestamp`` (Int64 seconds UTC) where there is a time,
            ``weight`` (Float32) where rows weigh differently; in log order, see ``in_log_order``,
            once ``filter_events`` is done.
        steps: rows in and out of each step, in the order they ran.
        quarantine: the bad rows that were dropped: the columns that were read, ``file``, ``row``
            (within the file, from 0) and ``reason``. Empty where there were none.
        notes: what people should know and nobody refused.
    """

    frame: pl.DataFrame
    steps: list[StepCount]
    quarantine: pl.DataFrame
    notes: list[str] = field(default_factory=list)


def event_columns(settings: DataSettings) -> set[str]:
    """The columns that ``check_events`` may need of the events."""
    columns = settings.columns
    named = {columns.user, columns.item, columns.timestamp, columns.event, columns.weight}
    where = {name for key in settings.where for name in (key, key.removeprefix("events."))}
    return {name for name in named if name} | where


def check_events(
    events: Table | pl.DataFrame,
    settings: DataSettings,
    *,
    users: pl.DataFrame | None = None,
    items: pl.DataFrame | None = None,
    now: int | None = None,
) -> CleanEvents:
    """The steps up to the bad rows, on raw events.

    Args:
        events: as read, with the columns of the source.
        settings: which columns, conditions and policies.
        users: user table with canonical ``user_id``, for conditions on its columns.
        items: item table with canonical ``item_id``, likewise.
        now: seconds since 1970 beyond which a time lies in the future; the clock if not given.

    Returns:
        Canonical columns, in the order of the files; what else was found of rows, such as their
        fractions of a second, is in columns that begin with ``_``.

    Raises:
        ConfigError: a condition or a combination of settings makes no sense.
        DataError: a column is missing, ids are floats, bad rows are refused or too many, or a
            condition left nothing; the message names it.
    """
    table = events if isinstance(events, Table) else _as_table(events)
    notes: list[str] = []
    columns = _present_columns(table, settings, notes)
    steps = Steps()
    raw = _RawRows(table, columns, settings)
    tables = {"users": users, "items": items}
    for key, mask in where_masks(settings.where, raw, tables):
        before = raw.frame.height
        raw.keep(mask)
        setting = f"data.where.{key} = {settings.where[key]!r}"
        steps.record(f"where {key}", before, raw.frame.height, setting=setting)
    frame, reasons = raw.canonical(notes, now)
    frame, quarantine = _take_bad_rows(raw, frame, reasons, settings, steps)
    return CleanEvents(frame, steps.counts, quarantine, notes)


def _as_table(frame: pl.DataFrame) -> Table:
    return Table(frame, tuple(frame.columns), (("the events", frame.height),), "the events")


def _present_columns(table: Table, settings: DataSettings, notes: list[str]) -> ColumnSettings:
    """The column settings with an absent default timestamp taken out; others must be there."""
    columns = settings.columns
    wanted = {columns.user: "data.columns.user", columns.item: "data.columns.item"}
    if len(wanted) == 1:
        raise ConfigError(f"data.columns: {columns.user!r} is named for users and for items")
    timestamp = columns.timestamp or None
    if timestamp == DEFAULT_TIMESTAMP and timestamp not in table.columns:
        near = closest(timestamp, list(table.columns))
        hint = f"; is it {near!r}? Then set data.columns.timestamp" if near else ""
        notes.append(f"no column {timestamp!r}: the log has no times{hint}")
        timestamp = None
    for name in ("event", "weight"):
        if column := getattr(columns, name):
            wanted[column] = f"data.columns.{name}"
    if timestamp:
        wanted[timestamp] = "data.columns.timestamp"
    if settings.event_weights and not columns.event:
        raise ConfigError(
            "data.event_weights needs data.columns.event, the column of the event type"
        )
    require_columns(table, wanted, name="events")
    return ColumnSettings(
        user=columns.user,
        item=columns.item,
        timestamp=timestamp,
        event=columns.event or None,
        weight=columns.weight or None,
    )


class _RawRows:
    """The rows that are still in, with their row numbers, in the columns of the source."""

    def __init__(self, table: Table, columns: ColumnSettings, settings: DataSettings) -> None:
        self.table, self.columns = table, columns
        self.rows = pl.int_range(table.frame.height, dtype=pl.UInt32, eager=True)
        self.frame = table.frame
        text = settings.id_type == "string"
        self.time_unit = settings.time_unit
        self.users = canonical_ids(self.column("user"), where=self.where("user"), as_text=text)
        self.items = canonical_ids(self.column("item"), where=self.where("item"), as_text=text)

    def column(self, role: str) -> pl.Series:
        name: str = getattr(self.columns, role)
        return self.frame[name]

    def where(self, role: str) -> str:
        return f"{self.table.label}: column {getattr(self.columns, role)!r}"

    def keep(self, mask: pl.Series) -> None:
        self.frame, self.rows = self.frame.filter(mask), self.rows.filter(mask)
        self.users, self.items = self.users.filter(mask), self.items.filter(mask)

    def canonical(
        self, notes: list[str], now: int | None
    ) -> tuple[pl.DataFrame, list[tuple[str, str, pl.Expr]]]:
        """Canonical columns, and per kind of bad row (column, reason, expression)."""
        series = {"user_id": self.users, "item_id": self.items}
        reasons = [
            (self.columns.user, "user is missing", pl.col("user_id").is_null()),
            (self.columns.item, "item is missing", pl.col("item_id").is_null()),
        ]
        if self.columns.timestamp:
            raw = self.column("timestamp")
            times = read_times(raw, unit=self.time_unit, where=self.where("timestamp"), now=now)
            notes.append(times.note)
            missing = raw.is_null() | (raw.is_nan() if raw.dtype.is_float() else raw.is_null())
            series |= {"timestamp": times.seconds, "_missing_time": missing.fill_null(True)}
            if times.fraction is not None:
                series["_fraction"] = times.fraction
            time = pl.col("timestamp")
            reasons += [
                (self.columns.timestamp, reason, expression)
                for reason, expression in (
                    ("time is missing", pl.col("_missing_time")),
                    ("time is unreadable", time.is_null()),
                    ("time is before 1995", time < EARLIEST),
                    ("time is in the future", time > latest(now)),
                )
            ]
        if self.columns.weight:
            series["weight"] = _weights(self.column("weight"), self.where("weight"))
            weight = pl.col("weight")
            reasons += [
                (self.columns.weight, "weight is missing", weight.is_null()),
                (self.columns.weight, "weight is not finite", ~weight.is_finite()),
                (self.columns.weight, "weight is not above 0", weight <= 0),
            ]
        if self.columns.event:
            series["_event"] = self.column("event")
            if series["_event"].dtype.is_nested():
                raise DataError(f"{self.where('event')} holds lists; expected one type per row")
        frame = pl.DataFrame([values.alias(name) for name, values in series.items()])
        return frame, reasons


def _weights(series: pl.Series, where: str) -> pl.Series:
    if not series.dtype.is_numeric() and series.dtype != pl.Null:
        raise DataError(f"{where} holds {series.dtype}; weights must be numbers")
    # Checked after the cast: 1e-60 is 0 and 1e60 infinite in float32.
    return series.cast(pl.Float32)


# --- bad rows -------------------------------------------------------------------------------------


def _take_bad_rows(
    raw: _RawRows,
    frame: pl.DataFrame,
    reasons: list[tuple[str, str, pl.Expr]],
    settings: DataSettings,
    steps: Steps,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Good rows, and the quarantine; each bad row counts under its first reason."""
    # One byte a row, where text would be sixteen.
    kinds = pl.Enum([text for _, text, _ in reasons])
    reason = pl.coalesce(
        pl.when(expression).then(pl.lit(text, dtype=kinds)).otherwise(None)
        for _, text, expression in reasons
    )
    why = frame.select(reason.alias("reason"))["reason"]
    bad = why.is_not_null()
    num_bad, num_rows = int(bad.sum()), frame.height
    if num_bad:
        _refuse_bad_rows(raw, why, reasons, settings)
    steps.record("bad_rows", num_rows, num_rows - num_bad, setting="data.columns")
    files, rows = raw.table.locate(raw.rows.filter(bad))
    added = {"file": files, "row": rows, "reason": why.filter(bad).cast(pl.String)}
    original = raw.frame.filter(bad)
    renamed = {name: f"{name}_original" for name in added if name in original.columns}
    quarantine = original.rename(renamed).with_columns(
        values.alias(name) for name, values in added.items()
    )
    return (frame.filter(~bad) if num_bad else frame), quarantine


def _example(values: pl.Series, reason: str) -> str:
    """The first of some bad values, of which there is at least one; nothing where it is none."""
    first = values[0]
    if first is None:
        return ""
    found = f", the first {str(first)[:40]!r}"
    if reason != "time is unreadable":
        return found
    return f"{found}, expected ISO 8601 such as '2024-12-31 10:00:00'"


def _refuse_bad_rows(
    raw: _RawRows, why: pl.Series, reasons: list[tuple[str, str, pl.Expr]], settings: DataSettings
) -> None:
    num_rows, num_bad = len(why), len(why) - why.null_count()
    share = num_bad / num_rows
    if settings.bad_rows == "drop" and share <= settings.max_bad_share:
        return
    details, missing = [], None
    for column, text, _ in reasons:
        hit = (why == text).fill_null(False)
        if not hit.any():
            continue
        rows = raw.rows.filter(hit)
        details.append(
            f"column {column!r}: {text} in {len(rows):,} ({raw.table.name_rows(rows)})"
            f"{_example(raw.frame[column].filter(hit), text)}"
        )
        if missing is None and text.endswith("missing"):
            missing = column
    condition = "" if missing is None else f' such as data.where = {{ {missing} = "not null" }}'
    advice = (
        f"mend them, leave them out with a condition{condition}, or set data.bad_rows = 'drop'"
        if settings.bad_rows == "refuse"
        else f"data.max_bad_share allows {settings.max_bad_share:.2%}; mend them or raise it"
    )
    raise DataError(
        f"{raw.table.label}: {num_bad:,} bad rows of {num_rows:,} ({share:.2%}); rows count from "
        f"0; {'; '.join(details)}; {advice}"
    )


# --- after the check ------------------------------------------------------------------------------


def filter_events(clean: CleanEvents, settings: DataSettings) -> CleanEvents:
    """The steps after the bad rows: weights, order, duplicates, k-core, caps.

    Args:
        clean: as ``check_events`` returns it. Whoever holds it meanwhile keeps its rows in memory
            beside those that are sorted.

    Raises:
        DataError: a step left nothing, or a weight is beyond float32; the message names it.
    """
    frame, steps, found = clean.frame, Steps(clean.steps), replace(clean, frame=pl.DataFrame())
    del clean

    def step(name: str, setting: str, run: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
        nonlocal frame
        after = run(frame)
        steps.record(name, frame.height, after.height, setting=setting)
        frame = after

    if settings.event_weights:
        step(
            "event_weights",
            "data.event_weights",
            lambda rows: weigh_events(rows, settings.event_weights),
        )
    frame = in_log_order(frame, heavy_first=settings.deduplicate == "first")
    if settings.deduplicate != "none":
        step(
            "deduplicate",
            "data.deduplicate",
            lambda rows: deduplicate(rows, settings.deduplicate),
        )
    if settings.k_core_user > 1 or settings.k_core_item > 1:
        step(
            "k_core",
            f"data.k_core_user = {settings.k_core_user}, k_core_item = {settings.k_core_item}",
            lambda rows: k_core(
                rows, min_per_user=settings.k_core_user, min_per_item=settings.k_core_item
            ),
        )
    if settings.max_per_user is not None:
        most = settings.max_per_user
        step("max_per_user", f"data.max_per_user = {most}", lambda rows: cap_users(rows, most))
    if "weight" in frame.columns and not frame["weight"].is_between(0, _LARGEST, "right").all():
        raise DataError(
            "a weight times its data.event_weights, or a sum of weights, is beyond float32; scale "
            "the weights down"
        )
    kept = frame.select(name for name in frame.columns if not name.startswith("_"))
    return replace(found, frame=kept, steps=steps.counts)
