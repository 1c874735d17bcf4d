"""From a raw table to rows without mistakes: conditions, ids, times, weights, bad rows.

Conditions come before the check for bad rows, so that ``where = { user_id = "not null" }`` keeps
the anonymous rows of a shop from being errors. What follows is ``clean``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl

from recclr.data.files import closest
from recclr.data.filters import StepCount, Steps
from recclr.data.ids import canonical_ids
from recclr.data.tables import Table, require_columns
from recclr.data.times import EARLIEST, TimesSeen, latest, read_times
from recclr.data.where import where_masks
from recclr.errors import ConfigError, DataError
from recclr.settings import ColumnSettings, DataSettings

DEFAULT_TIMESTAMP = "timestamp"

Reason = tuple[str, str, pl.Expr]
"""A kind of bad row: the column of the source, what is wrong, and which rows are so."""


@dataclass(frozen=True, eq=False)
class CleanEvents:
    """What came through, and what became of the rest.

    Attributes:
        frame: ``user_id``, ``item_id``, ``timestamp`` (Int64 seconds UTC) where there is a time,
            ``weight`` (Float32) where rows weigh differently; in log order, see ``in_log_order``,
            once ``clean.filter_events`` is done.
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
    pieces: PiecesSeen | None = None,
) -> CleanEvents:
    """The steps up to the bad rows, on raw events.

    Args:
        events: as read, with the columns of the source.
        settings: which columns, conditions and policies.
        users: user table with canonical ``user_id``, for conditions on its columns.
        items: item table with canonical ``item_id``, likewise.
        now: seconds since 1970 beyond which a time lies in the future; the clock if not given.
        pieces: what is known of the pieces before, where these events are one of several. What
            only the whole can tell is then refused by ``PiecesSeen.refuse``.

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
    steps = Steps() if pieces is None else pieces.steps
    raw = _RawRows(table, columns, settings)
    tables = {"users": users, "items": items}
    for key, mask in where_masks(settings.where, raw, tables):
        before = raw.frame.height
        raw.keep(mask)
        setting = f"data.where.{key} = {settings.where[key]!r}"
        steps.record(f"where {key}", before, raw.frame.height, setting=setting)
    frame, reasons = raw.canonical(notes, now, None if pieces is None else pieces.times)
    num_rows = frame.height
    frame, quarantine = _take_bad_rows(raw, frame, reasons)
    if pieces is None or settings.bad_rows == "refuse":
        _refuse_bad_rows(table, num_rows, quarantine, reasons, settings)
    steps.record("bad_rows", num_rows, frame.height, setting="data.columns")
    if pieces is not None:
        # Of rows that nobody keeps, such as those without times, nothing is to be said.
        pieces.told(table, quarantine, reasons, notes if frame.height else ())
    return CleanEvents(frame, steps.counts, quarantine, notes)


class PiecesSeen:
    """What is kept of the pieces of one table while ``check_events`` sees one after another.

    Attributes:
        steps: of all of them. times: what is known of their times.
        quarantine: bad rows that were dropped. notes: each once.
    """

    def __init__(self, times: TimesSeen) -> None:
        self.steps, self.times = Steps(in_pieces=True), times
        self.notes: dict[str, None] = {}
        self._bad: list[pl.DataFrame] = []
        self._last: tuple[Table, list[Reason]] | None = None

    @property
    def quarantine(self) -> pl.DataFrame:
        return pl.concat(self._bad)

    def told(
        self, table: Table, quarantine: pl.DataFrame, reasons: list[Reason], notes: Sequence[str]
    ) -> None:
        """A piece was checked."""
        self._bad.append(quarantine)
        self.notes |= dict.fromkeys(notes)
        self._last = table, reasons

    def refuse(self, settings: DataSettings) -> None:
        """Once all pieces were checked.

        Raises:
            DataError: a step left nothing of all, or too many rows are bad.
        """
        assert self._last is not None
        num_rows = next(step.rows_in for step in self.steps.counts if step.name == "bad_rows")
        table, reasons = self._last
        self.times.refuse_undecided(f"{table.label}: column {settings.columns.timestamp!r}")
        _refuse_bad_rows(table, num_rows, self.quarantine, reasons, settings)
        self.steps.refuse_empty()


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
        self, notes: list[str], now: int | None, seen: TimesSeen | None
    ) -> tuple[pl.DataFrame, list[Reason]]:
        """Canonical columns, and per kind of bad row (column, reason, expression).

        Args:
            seen: of the times in earlier pieces of the table, where it comes in some.
        """
        series = {"user_id": self.users, "item_id": self.items}
        reasons = [
            (self.columns.user, "user is missing", pl.col("user_id").is_null()),
            (self.columns.item, "item is missing", pl.col("item_id").is_null()),
        ]
        if self.columns.timestamp:
            raw = self.column("timestamp")
            where = self.where("timestamp")
            times = read_times(raw, unit=self.time_unit, where=where, now=now, seen=seen)
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
    reasons: list[Reason],
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
    files, rows = raw.table.locate(raw.rows.filter(bad))
    added = {"file": files, "row": rows, "reason": why.filter(bad).cast(pl.String)}
    original = raw.frame.filter(bad)
    renamed = {name: _original(name) for name in added if name in original.columns}
    quarantine = original.rename(renamed).with_columns(
        values.alias(name) for name, values in added.items()
    )
    return (frame.filter(~bad) if quarantine.height else frame), quarantine


def _example(values: pl.Series, reason: str) -> str:
    """The first of some bad values, of which there is at least one; nothing where it is none."""
    first = values[0]
    if first is None:
        return ""
    found = f", the first {str(first)[:40]!r}"
    if reason != "time is unreadable":
        return found
    return f"{found}, expected ISO 8601 such as '2024-12-31 10:00:00'"


def _original(column: str) -> str:
    """What a column of the source is called in the quarantine where that has one of the name."""
    return f"{column}_original"


def _refuse_bad_rows(
    table: Table,
    num_rows: int,
    quarantine: pl.DataFrame,
    reasons: list[Reason],
    settings: DataSettings,
) -> None:
    num_bad = quarantine.height
    share = num_bad / max(num_rows, 1)
    if not num_bad or (settings.bad_rows == "drop" and share <= settings.max_bad_share):
        return
    among = f"{num_rows:,} ({share:.2%})"
    if table.num_parts:
        among += " that were looked at"
    details, missing = [], None
    for column, text, _ in reasons:
        rows = quarantine.filter(pl.col("reason") == text)
        if not rows.height:
            continue
        kept = column if column not in ("file", "row", "reason") else _original(column)
        named = table.names_of(rows["file"], rows["row"])
        details.append(
            f"column {column!r}: {text} in {rows.height:,} ({named}){_example(rows[kept], text)}"
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
        f"{table.label}: {num_bad:,} bad rows of {among}; rows count from 0; "
        f"{'; '.join(details)}; {advice}"
    )
