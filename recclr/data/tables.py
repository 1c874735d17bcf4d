"""One table from wherever it comes: Parquet, CSV, JSON lines, polars, pandas or Arrow.

Values are never changed on the way in. Types of several files are widened only where no value can
change; integers never pass through floats; text of a CSV becomes a number only where every value
of the column is one and writing it back would give the same text ("0012" stays text).
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from recclr.data.files import closest, format_of, resolve_files
from recclr.data.schema import joint_schema
from recclr.errors import DataError

_READ_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException)
_FAILURES = (*_READ_ERRORS, OSError, ValueError, TypeError, OverflowError)

_INTEGER = r"^(0|-?[1-9][0-9]*)$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$|^(?i)-?(nan|inf)$"
_LEADING_ZERO = r"^[+-]?0[0-9]"
_BOOLEAN = r"^(?i)(true|false)$"


@dataclass(frozen=True, eq=False)
class Table:
    """A table and where its rows came from.

    Attributes:
        frame: the columns asked for, rows in order of the files.
        columns: names of all columns of the source, also of those not asked for.
        parts: (label, number of rows) of each file, in order; one part for a frame in memory.
        label: what to call the whole in a message.
        first_row: rows of the first part that come before those here.
        num_parts: files of the source, where these rows are not all of it; 0 else.
    """

    frame: pl.DataFrame
    columns: tuple[str, ...]
    parts: tuple[tuple[str, int], ...]
    label: str
    first_row: int = 0
    num_parts: int = 0

    def locate(self, rows: pl.Series) -> tuple[pl.Series, pl.Series]:
        """File (String [n]) and row within it (UInt32 [n], from 0) of rows of ``frame``."""
        starts = np.cumsum([0] + [count for _, count in self.parts])
        which = np.searchsorted(starts, rows.to_numpy(), side="right") - 1
        labels = pl.Series("file", [label for label, _ in self.parts], dtype=pl.String)
        before = np.where(which == 0, self.first_row, 0)
        inside = pl.Series("row", rows.to_numpy() - starts[which] + before, dtype=pl.UInt32)
        return labels.gather(pl.Series(which)), inside

    def name_rows(self, rows: pl.Series, most: int = 5) -> str:
        """The first rows for a message: ``rows 3, 9`` or ``part-3.parquet row 7, ...`` (from 0)."""
        return self.names_of(*self.locate(rows), most)

    def names_of(self, files: pl.Series, inside: pl.Series, most: int = 5) -> str:
        """As ``name_rows``, of rows that are located already."""
        several = max(len(self.parts), self.num_parts) > 1
        shown = zip(files.head(most), inside.head(most), strict=True)
        named = ", ".join(f"{file} row {row}" if several else str(row) for file, row in shown)
        prefix = "" if several else "rows " if len(inside) > 1 else "row "
        return prefix + named + (", ..." if len(inside) > most else "")


def read_table(
    source: Any, *, name: str, keep: Collection[str] | None = None, text: Collection[str] = ()
) -> pl.DataFrame:
    """The table as a polars frame; see ``load_table``."""
    return load_table(source, name=name, keep=keep, text=text).frame


def load_table(
    source: Any, *, name: str, keep: Collection[str] | None = None, text: Collection[str] = ()
) -> Table:
    """Read a table.

    Args:
        source: path (file, folder of shards or glob), polars frame or lazy frame, pandas frame,
            Arrow table or record batch.
        name: what the table is, for messages, such as "events".
        keep: read these columns only, where the source has them. Each must then be in every file
            or in none. None reads all; a column that some files lack is null there.
        text: columns that stay text in a CSV whatever they look like.

    Raises:
        ConfigError: the path names an environment variable that is not set.
        DataError: nothing to read, a damaged file, types that cannot be joined, or no rows.
    """
    if isinstance(source, (str, os.PathLike)):
        table = _from_files(os.fspath(source), name, keep, text)
    else:
        frame, columns = _from_memory(source, name, keep)
        label = f"the {name} {type(source).__name__}"
        table = Table(frame, columns, ((label, frame.height),), label)
    # Without a single kept column the height is unknown; the caller then refuses for the columns.
    if table.frame.width and not table.frame.height:
        raise DataError(f"{name}: {table.label} has no rows")
    return table


def require_columns(table: Table, wanted: dict[str, str], *, name: str) -> None:
    """Refuse a table that lacks a column.

    Args:
        table: as read; its ``columns`` are looked at.
        wanted: column -> the setting that names it, for the message.
        name: what the table is.
    """
    for column, setting in wanted.items():
        if column in table.columns:
            continue
        if separator := _other_separator(table.columns):
            raise DataError(
                f"{name}: {table.label} has one column, {table.columns[0][:80]!r}: expected values "
                f"between commas, found {separator!r} there; write it with commas, or as Parquet"
            )
        near = closest(column, list(table.columns))
        hint = f"did you mean {near!r}? Set" if near else "set"
        raise DataError(
            f"{name}: {table.label} has no column {column!r} (from {setting}); found "
            f"{_listed(table.columns)}; {hint} {setting} to the name in the file"
        )


def _other_separator(columns: Sequence[str]) -> str | None:
    """What stands between the names of a header that was read as a single one."""
    if len(columns) != 1:
        return None
    return next((mark for mark in (";", "\t", "|") if mark in columns[0]), None)


def _listed(names: Sequence[str], most: int = 30) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def _kept(columns: Sequence[str], keep: Collection[str] | None) -> list[str]:
    return [column for column in columns if keep is None or column in keep]


# --- frames in memory -----------------------------------------------------------------------------


def _from_memory(
    source: Any, name: str, keep: Collection[str] | None
) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """The kept columns, and the names of all."""
    try:
        if isinstance(source, pl.LazyFrame):
            columns = tuple(source.collect_schema().names())
            return source.select(_kept(columns, keep)).collect(), columns
        if isinstance(source, pl.DataFrame):
            frame = source
        elif type(source).__module__.partition(".")[0] == "pandas" and hasattr(source, "columns"):
            frame = _from_pandas(source, name)
        elif hasattr(source, "__arrow_c_stream__") or hasattr(source, "__arrow_c_array__"):
            frame = pl.DataFrame(pl.from_arrow(pa.table(source)))
        else:
            raise DataError(
                f"{name}: expected a path, a polars or pandas frame or an Arrow table, "
                f"found {type(source).__name__}"
            )
    except DataError:
        raise
    except _FAILURES as error:
        raise DataError(f"{name}: the {type(source).__name__} cannot be read: {error}") from error
    return frame.select(_kept(frame.columns, keep)), tuple(frame.columns)


def _from_pandas(frame: Any, name: str) -> pl.DataFrame:
    names = [str(column) for column in frame.columns]
    if len(set(names)) < len(names):
        raise DataError(f"{name}: the pandas frame has columns of the same name: {_listed(names)}")
    arrays = [_pandas_column(frame.iloc[:, i], names[i], name) for i in range(len(names))]
    return pl.DataFrame(pl.from_arrow(pa.table(arrays, names=names)))


def _pandas_column(series: Any, column: str, name: str) -> Any:
    try:
        return pa.array(series, from_pandas=True)
    except _FAILURES as error:
        try:  # Python integers above 2^63 in an object column
            return pa.array(series, from_pandas=True, type=pa.uint64())
        except _FAILURES:
            raise DataError(
                f"{name}: the pandas column {column!r} holds values of several types: {error}; "
                "convert it to one type"
            ) from error


# --- files ----------------------------------------------------------------------------------------


def _from_files(
    source: str, name: str, keep: Collection[str] | None, text: Collection[str]
) -> Table:
    files = resolve_files(source, name=name)
    labels = in_folder(files)
    kind = format_of(files[0])
    frames, columns = [], list[tuple[str, ...]]()
    for path in files:
        frame, found = _read_file(path, kind, name, keep)
        frames.append(frame)
        columns.append(found)
    if keep is not None:
        refuse_partial(labels, columns, keep, name)
    schema = joint_schema(labels, [frame.schema for frame in frames], name)
    whole = pl.concat([cast_to(frame, schema) for frame in frames])
    if kind == "csv":
        whole = whole.select(
            column if column.name in text else _typed(column) for column in whole.get_columns()
        )
    parts = tuple(zip(labels, (frame.height for frame in frames), strict=True))
    found_any = tuple(dict.fromkeys(column for found in columns for column in found))
    label = str(files[0]) if len(files) == 1 else f"{source} ({len(files)} files)"
    return Table(whole, found_any, parts, label)


def in_folder(files: Sequence[Path]) -> list[str]:
    """What to call files of one source: by their path in the folder of the first, if several."""
    if len(files) == 1:
        return [str(files[0])]
    folder = files[0].parent
    return [
        str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
        for path in files
    ]


@contextmanager
def unreadable(path: Path, kind: str | None, name: str) -> Iterator[None]:
    """Turn what goes wrong while a file is read into an error that says which."""
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{name}: no permission to read {path}") from error
    except _FAILURES as error:
        raise DataError(
            f"{name}: {path} cannot be read as {kind}: {_first_line(error)}; the file is damaged, "
            "cut short or of another format"
        ) from error


def _read_file(
    path: Path, kind: str | None, name: str, keep: Collection[str] | None
) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """The kept columns of one file, and the names of all its columns."""
    with unreadable(path, kind, name):
        if kind == "parquet":
            # Opened here, and glob and hive parsing off: a name is a name, whatever it holds.
            with path.open("rb") as opened:
                found = tuple(pl.read_parquet_schema(opened))
            frame = pl.read_parquet(
                path, columns=_kept(found, keep), glob=False, hive_partitioning=False
            )
        elif kind == "csv":
            frame, found = _read_csv(path, keep)
        else:
            frame = _read_jsonl(path)
            found = tuple(frame.columns)
            frame = frame.select(_kept(found, keep))
    return frame, found


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _read_csv(path: Path, keep: Collection[str] | None) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """All kept columns as text; a row with too few or too many fields is an error with its line.

    Arrow's reader, since that of polars fills short rows with nulls without a word.
    """
    from pyarrow import csv as arrow_csv

    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # Bad bytes further down in the buffer are left to Arrow, which names their row.
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        found = tuple(next(csv.reader(file, delimiter=delimiter), ()))
    if len(set(found)) < len(found):
        raise ValueError(f"two columns have the same name in the header: {_listed(found)}")
    kept = _kept(found, keep)
    table = arrow_csv.read_csv(
        path,
        # One thread: only then does an error carry its row number.
        read_options=arrow_csv.ReadOptions(use_threads=False),
        parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(
            column_types={column: pa.string() for column in found},
            include_columns=kept or list(found),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    return pl.DataFrame(pl.from_arrow(table)).select(kept), found


def _read_jsonl(path: Path) -> pl.DataFrame:
    try:
        return pl.read_ndjson(path, infer_schema_length=None)
    except _READ_ERRORS as error:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    value = json.loads(line) if line.strip() else {}
                except (ValueError, RecursionError) as at_line:
                    raise ValueError(f"line {number} is no JSON: {at_line}") from error
                if not isinstance(value, dict):
                    raise ValueError(f"line {number} is no JSON object") from error
        raise


def _typed(column: pl.Series) -> pl.Series:
    """Text as numbers or booleans where every value is one; otherwise as it came."""
    values = column.drop_nulls()
    if not len(values):
        return column
    if values.str.contains(_INTEGER).all():
        for dtype in (pl.Int64(), pl.UInt64()):
            cast = column.cast(dtype, strict=False)
            if cast.null_count() == column.null_count():
                return cast
        return column
    if values.str.contains(_NUMBER).all() and not values.str.contains(_LEADING_ZERO).any():
        return column.cast(pl.Float64)
    if values.str.contains(_BOOLEAN).all():
        return (column.str.to_lowercase() == "true").rename(column.name)
    return column


def refuse_partial(
    labels: list[str], columns: list[tuple[str, ...]], keep: Collection[str], name: str
) -> None:
    """Refuse a column that is to be read and that only some files have."""
    for column in keep:
        has = [label for label, found in zip(labels, columns, strict=True) if column in found]
        if has and len(has) < len(labels):
            lacks = next(label for label in labels if label not in has)
            raise DataError(f"{name}: column {column!r} is in {has[0]} but not in {lacks}")


def cast_to(frame: pl.DataFrame, schema: dict[str, pl.DataType]) -> pl.DataFrame:
    """The columns of a schema, which hold all values of the frame; nulls where it has none."""
    return frame.select(
        pl.col(column).cast(dtype) if column in frame.columns else pl.lit(None, dtype).alias(column)
        for column, dtype in schema.items()
    )
