"""Timestamps of any common form as whole seconds since 1970, UTC.

Integers say nothing of their unit, but the years 1995 to now fall into ranges of s, ms, us and ns
that do not touch: the unit is read off the values and said. A column in which two units occur is
refused, since half of it would silently land in 1970.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from recclr.errors import DataError

EARLIEST = 788_918_400
"""1995-01-01 UTC; an earlier event is taken for a mistake."""
TOLERANCE_S = 86_400
"""How far beyond now a time may lie: clocks and time zones differ."""

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

# Tried in turn; text without a zone is UTC. The zone is normalised to +HHMM before.
_ZONED = ("%Y-%m-%dT%H:%M:%S%.f%z", "%Y-%m-%dT%H:%M%z")
_NAIVE = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M")
_INTEGER_TEXT = r"^-?[0-9]{1,18}$"


@dataclass(frozen=True, eq=False)
class Times:
    """One column of times.

    Attributes:
        seconds: Int64 [n], UTC; null where the value is missing or unreadable.
        fraction: Int64 [n] nanoseconds within the second, 0 up to 10^9; only orders the rows. None
            where all are whole seconds.
        note: how the column was read, for people.
    """

    seconds: pl.Series
    fraction: pl.Series | None
    note: str


def read_times(
    series: pl.Series,
    *,
    unit: str,
    where: str,
    now: int | None = None,
    seen: TimesSeen | None = None,
) -> Times:
    """Convert a column.

    Args:
        series: integers, floats, text (ISO 8601 or digits), Date or Datetime; naive ones are UTC.
        unit: ``s``, ``ms``, ``us``, ``ns``, or ``auto`` to detect it from the range.
        where: table and column, for messages.
        now: seconds since 1970; the clock where not given.
        seen: of a column that comes in pieces, what is known of it, and learned here.

    Raises:
        DataError: another type, values in two units, or no value between 1995 and tomorrow.
    """
    dtype = series.dtype
    if dtype == pl.Null:
        empty = series.cast(pl.Int64)
        return Times(empty, None, f"{where}: no value")
    if dtype == pl.Date:
        seconds = series.cast(pl.Int64) * 86_400
        return Times(seconds, None, f"{where}: dates, taken at midnight UTC")
    if isinstance(dtype, pl.Datetime):
        zone = "UTC" if dtype.time_zone is None else f"{dtype.time_zone}, converted to UTC"
        seconds, fraction = _cut(series.to_physical(), PER_SECOND[dtype.time_unit])
        return Times(seconds, fraction, f"{where}: date and time, {zone}")
    if isinstance(dtype, (pl.String, pl.Categorical, pl.Enum)):
        text = series.cast(pl.String).str.strip_chars()
        digits = bool(text.drop_nulls().str.contains(_INTEGER_TEXT).all())
        if not (digits if seen is None else seen.only_digits(text, digits)):
            return _from_text(text, where)
        series = text.cast(pl.Int64)
    elif not dtype.is_numeric() or isinstance(dtype, pl.Decimal):
        raise DataError(f"{where} holds {dtype}; expected times as numbers, text or datetimes")
    found = unit if unit != "auto" else detect_unit(series, where=where, now=now, seen=seen)
    seconds, fraction = _cut(series, PER_SECOND[found])
    how = "as declared" if unit != "auto" else "detected from the values"
    return Times(seconds, fraction, f"{where}: numbers in {found}, {how}")


def latest(now: int | None = None) -> int:
    """The last second that is not refused as lying in the future."""
    return int(time.time() if now is None else now) + TOLERANCE_S


@dataclass
class TimesSeen:
    """What is known of a column of times that comes in pieces.

    Attributes:
        units: values in each unit so far. words: some value is no number, so that all are text.
        numbers: some text was read as numbers. guessed: in some piece nothing told the unit.
        reach: the least and the largest value of such pieces.
    """

    units: Counter[str] = field(default_factory=Counter)
    words: bool = False
    numbers: bool = False
    guessed: bool = False
    reach: list[Any] = field(default_factory=list)

    @property
    def misread(self) -> bool:
        """Whether a piece was read otherwise than as all of the column asks for."""
        return (self.words and self.numbers) or (
            self.guessed and next(iter(self.units), "s") != "s"
        )

    def again(self) -> TimesSeen:
        """What is known for a second reading."""
        return TimesSeen(Counter(dict.fromkeys(self.units, 0)), words=self.words)

    def only_digits(self, text: pl.Series, digits: bool) -> bool:
        """Whether the column is one of numbers, as far as is known."""
        self.words |= not digits
        self.numbers |= not self.words and text.null_count() < len(text)
        return not self.words

    def refuse_undecided(self, where: str) -> None:
        """Once all pieces were read: refuse a column without a time in any unit."""
        if self.guessed and not self.units:
            raise _no_times(where, min(self.reach), max(self.reach))


def detect_unit(
    series: pl.Series, *, where: str, now: int | None = None, seen: TimesSeen | None = None
) -> str:
    """``s``, ``ms``, ``us`` or ``ns``: the one unit in which values fall between 1995 and tomorrow.

    Args:
        seen: of the pieces before; nothing is then refused for having no time.

    Raises:
        DataError: no unit, or more than one, has such values. A column of nulls is "s".
    """
    values = series.drop_nulls()
    units = Counter[str]() if seen is None else seen.units
    if not len(values):
        return next(iter(units), "s")
    if values.dtype.is_integer() and values.dtype != pl.UInt64:
        values = values.cast(pl.Int64)
    for unit, factor in PER_SECOND.items():
        if count := int(values.is_between(EARLIEST * factor, latest(now) * factor).sum()):
            units[unit] += count
    present = [unit for unit in PER_SECOND if unit in units]
    if len(present) > 1:
        mixed = " and ".join(f"{units[unit]:,} values in {unit}" for unit in present)
        raise DataError(
            f"{where} mixes time units: {mixed}; convert them to one unit, or declare "
            "data.time_unit, after which the others count as impossible times"
        )
    if present:
        return present[0]
    if seen is None:
        raise _no_times(where, values.min(), values.max())
    seen.guessed = True
    seen.reach += [values.min(), values.max()]
    return "s"


def _no_times(where: str, least: Any, most: Any) -> DataError:
    return DataError(
        f"{where}: no value is a time between 1995 and now in s, ms, us or ns since 1970 "
        f"(they run from {least!r} to {most!r}); set data.columns.timestamp to "
        "the column of times, or to '' for a log without times"
    )


def _cut(values: pl.Series, factor: int) -> tuple[pl.Series, pl.Series | None]:
    """Whole seconds (rounded down), and the nanoseconds that are left where any are."""
    seconds, fraction = (_cut_float if values.dtype.is_float() else _cut_integer)(values, factor)
    return seconds, fraction if fraction is not None and (fraction != 0).any() else None


def _cut_integer(values: pl.Series, factor: int) -> tuple[pl.Series, pl.Series | None]:
    # Beyond Int64 no unit holds a possible time; null would read as missing, so clip instead.
    wide = values.clip(upper_bound=2**63 - 1) if values.dtype == pl.UInt64 else values
    wide = wide.cast(pl.Int64)
    if factor == 1:
        return wide, None
    seconds = wide // factor
    return seconds, (wide - seconds * factor) * (10**9 // factor)


def _cut_float(values: pl.Series, factor: int) -> tuple[pl.Series, pl.Series]:
    finite = values.cast(pl.Float64).set(~values.is_finite().fill_null(False), None) / factor
    floor = finite.floor()
    fraction = ((finite - floor) * 1e9).cast(pl.Int64)
    return floor.clip(-(2.0**62), 2.0**62).cast(pl.Int64), fraction


def _from_text(text: pl.Series, where: str) -> Times:
    normal = pl.DataFrame({"t": text}).select(
        pl.col("t")
        .str.replace(r"^(\d{4}-\d{2}-\d{2})$", "${1}T00:00:00")
        .str.replace(r"^(\d{4}-\d{2}-\d{2}) +", "${1}T")
        .str.replace(r"(?i) ?(Z|UTC)$", "+0000")
        .str.replace(r" ?([+-]\d{2}):?(\d{2})$", "${1}${2}")
        .str.replace(r"(T.*[+-]\d{2})$", "${1}00")
    )
    zoned = [pl.col("t").str.to_datetime(f, time_unit="ns", strict=False) for f in _ZONED]
    naive = [
        pl.col("t").str.to_datetime(f, time_unit="ns", time_zone="UTC", strict=False)
        for f in _NAIVE
    ]
    parsed = normal.select(pl.coalesce(*zoned, *naive))["t"]
    seconds, fraction = _cut(parsed.to_physical(), PER_SECOND["ns"])
    return Times(seconds, fraction, f"{where}: ISO 8601 text; UTC where no zone is given")
