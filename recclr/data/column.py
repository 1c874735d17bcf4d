"""One column of a user or item table as a feature reads it: its type, and errors naming rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recclr.data.files import closest
from recclr.data.vocabulary import gather
from recclr.errors import ConfigError, DataError

_NUMBERS = "integers, floats, decimals, booleans, dates or datetimes"
_CATEGORIES = "strings, integers, booleans, or floats that are whole"
_EXACT = float(1 << 53)
_HUGE = 1e150


@dataclass(frozen=True, eq=False)
class Column:
    """Values of one feature.

    Attributes:
        values: [n], null where there is nothing.
        name: column of the table. feature: the setting, such as ``item.features.year``.
        kind: the feature's kind, for messages.
        rows: int64 [n], row of the table that each value came from (-1: none); None where value i
            is row i.
    """

    values: pl.Series
    name: str
    feature: str
    kind: str
    rows: NDArray[np.int64] | None = None

    def label(self) -> str:
        """What to call the column in a message."""
        side = self.feature.partition(".")[0]
        return f"{side}s table: column {self.name!r} ({self.feature}, kind {self.kind!r})"

    def wrong_type(self, expected: str) -> DataError:
        """The column's type does not suit the kind."""
        return DataError(
            f"{self.label()} holds {self.values.dtype}; expected {expected}; convert the column, "
            "or choose another kind"
        )

    def refusal(self, bad: NDArray[np.bool_], problem: str, remedy: str) -> DataError:
        """The values where ``bad`` [n] is set are refused; names the first five rows (from 0)."""
        places = np.flatnonzero(bad)
        rows = np.sort(places if self.rows is None else self.rows[places])
        shown = ", ".join(str(row) for row in rows[:5])
        return DataError(
            f"{self.label()} holds {problem} in {len(rows):,} rows (first rows {shown}); {remedy}"
        )


def take_column(
    frame: pl.DataFrame | None,
    column: str,
    *,
    feature: str,
    kind: str,
    rows: NDArray[np.int64] | None = None,
) -> Column:
    """The column of a table, at the given rows (-1 for an entity without a row), or at all.

    Raises:
        ConfigError: there is no table.
        DataError: the table lacks the column.
    """
    side = feature.partition(".")[0]
    if frame is None:
        raise ConfigError(
            f"{feature} needs the {side}s table, and there is none; name it in data.{side}s, or "
            "leave the feature out"
        )
    if column not in frame.columns:
        near = closest(column, frame.columns)
        hint = f"did you mean {near!r}? Set" if near else "set"
        found = ", ".join(repr(name) for name in frame.columns[:30])
        raise DataError(
            f"{side}s table: no column {column!r} (from {feature}); found {found}; {hint} "
            f"{feature}.column to the name in the table"
        )
    values = frame[column] if rows is None else gather(frame[column], rows)
    return Column(values, column, feature, kind, rows)


def as_texts(column: Column, values: pl.Series | None = None) -> pl.Series:
    """Categories as String [n], byte-exact; nulls (and NaN) stay null.

    Integers of any width, and floats that are whole (which pandas makes of integers beside missing
    values), give the same text, so that a change of width between two runs changes nothing.

    Args:
        values: other values of the same column, such as the elements of its lists.
    """
    values = column.values if values is None else values
    dtype = values.dtype
    if dtype.is_float():
        return _whole_numbers(column, values).cast(pl.String)
    if dtype.is_integer() or isinstance(
        dtype, (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null)
    ):
        return values.cast(pl.String)
    expected = _CATEGORIES if values is column.values else f"lists of {_CATEGORIES}"
    raise column.wrong_type(expected)


def _whole_numbers(column: Column, values: pl.Series) -> pl.Series:
    present = values.cast(pl.Float64).fill_nan(None)
    bad = ((present != present.floor()) | (present.abs() > _EXACT)).fill_null(False)
    if bad.any():
        raise DataError(
            f"{column.label()} holds floats that are not whole, such as {present.filter(bad)[0]}; "
            f"expected {_CATEGORIES}; use kind = 'numeric', or convert the column"
        )
    return present.cast(pl.Int64)


def as_lists(column: Column) -> tuple[pl.Series, NDArray[np.int64]]:
    """Elements of all lists as String [nnz] without nulls, and their rows int64 [nnz].

    A column of plain values counts as lists of one.
    """
    values = column.values
    if isinstance(values.dtype, pl.Array):
        values = values.arr.to_list()
    if not isinstance(values.dtype, pl.List):
        elements = as_texts(column)
        rows = np.arange(len(values), dtype=np.int64)
    else:
        lengths = values.list.len().fill_null(0).to_numpy().astype(np.int64)
        # Explode makes a null of an empty list.
        elements = as_texts(column, values.filter(pl.Series(lengths > 0)).explode())
        rows = np.repeat(np.arange(len(values), dtype=np.int64), lengths)
    present = elements.is_not_null()
    return elements.filter(present), rows[present.to_numpy()]


def as_numbers(column: Column) -> NDArray[np.float64]:
    """Numbers float64 [n], NaN where missing (null or NaN); dates as seconds since 1970.

    Raises:
        DataError: another type, or a value so large that its square overflows.
    """
    values = column.values
    if isinstance(values.dtype, (pl.Date, pl.Datetime)):
        values = values.cast(pl.Datetime("us")).dt.epoch("us") / 1e6
    if not (values.dtype.is_numeric() or isinstance(values.dtype, (pl.Boolean, pl.Null))):
        raise column.wrong_type(_NUMBERS)
    numbers = np.array(values.cast(pl.Float64).fill_null(np.nan).to_numpy(), dtype=np.float64)
    huge = np.abs(numbers) > _HUGE
    if huge.any():
        raise column.refusal(
            huge, f"infinite values or some above {_HUGE:g}", "mend them, or write null"
        )
    return numbers
