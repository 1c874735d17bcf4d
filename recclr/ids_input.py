"""Ids from the command line and tables back to files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl
import pyarrow.parquet as pq

from recclr.data.tables import read_table
from recclr.data.vocabulary import Vocabulary
from recclr.errors import ConfigError, DataError
from recclr.files import new_file, write_bytes_atomic

_WRITERS: dict[str, Callable[[pl.DataFrame, io.BytesIO], Any]] = {
    ".parquet": pl.DataFrame.write_parquet,
    ".csv": pl.DataFrame.write_csv,
    ".jsonl": pl.DataFrame.write_ndjson,
    ".ndjson": pl.DataFrame.write_ndjson,
}


def read_ids(
    listed: str | None, source: str | None, vocabulary: Vocabulary, column: str
) -> pl.Series | None:
    """Ids that a command was given, in the type of the vocabulary; None if it was given none.

    Args:
        listed: ids separated by commas. source: path of a table that holds them.
        column: their column in it; a table of one column may name it as it likes.

    Raises:
        ConfigError: both were given, a list of none, or an id is no number where ids are numbers.
        DataError: the table has no such column, or an id is null.
    """
    if listed is not None and source is not None:
        raise ConfigError("give the ids either on the command line or in a file, not both")
    if listed is not None:
        parts = [part.strip() for part in listed.split(",") if part.strip()]
        if not parts:
            raise ConfigError(
                f"the list of ids {listed!r} names none; leave the option out to have all"
            )
        return _typed(pl.Series("id", parts, dtype=pl.String), vocabulary)
    if source is None:
        return None
    frame = read_table(source, name="ids")
    if column not in frame.columns and frame.width != 1:
        raise DataError(
            f"{source} has no column {column!r}, which holds the ids; found "
            f"{', '.join(map(repr, frame.columns))}"
        )
    ids = frame[column] if column in frame.columns else frame.to_series()
    if ids.null_count():
        raise DataError(
            f"{source}: {ids.null_count():,} of {len(ids):,} ids are null; leave these rows out"
        )
    return _typed(ids, vocabulary)


def require_ending(out: Path | None) -> None:
    """Refuse a name that ``write_rows`` cannot write, before the work.

    Raises:
        ConfigError: an ending that is not known.
    """
    if out is not None and out.suffix not in _WRITERS:
        raise ConfigError(f"--out {out}: expected a name that ends in {', '.join(_WRITERS)}")


def write_rows(
    frame: pl.DataFrame, out: Path | None, *, show: Callable[[Any], None], as_json: bool
) -> None:
    """Write a result to a file by its ending, or show it.

    Raises:
        ConfigError: an ending that is not known, or no permission. StoreError: no space.
    """
    require_ending(out)
    if out is None:
        show(frame.to_dicts() if as_json else frame)
        return
    buffer = io.BytesIO()
    _WRITERS[out.suffix](frame, buffer)
    write_bytes_atomic(out, buffer.getvalue())


def write_parts(frames: Iterable[pl.DataFrame], out: Path) -> None:
    """Write frames of the same columns, one below the other, of which one is held at a time.

    Args:
        frames: at least one, which may have no rows.

    Raises:
        ConfigError: an ending that is not known, or no permission. StoreError: no space.
    """
    require_ending(out)
    with new_file(out) as file:
        if out.suffix == ".parquet":
            _write_parquet(frames, file)
            return
        for number, frame in enumerate(frames):
            if out.suffix == ".csv":
                frame.write_csv(file, include_header=number == 0)
            else:
                frame.write_ndjson(file)


def _write_parquet(frames: Iterable[pl.DataFrame], file: BinaryIO) -> None:
    writer: pq.ParquetWriter | None = None
    try:
        for frame in frames:
            table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
    finally:
        # Not left to the garbage collector, which would find the file closed.
        if writer is not None:
            writer.close()


def _typed(ids: pl.Series, vocabulary: Vocabulary) -> pl.Series:
    if ids.dtype == pl.String and vocabulary.ids.dtype.is_integer():
        numbers = ids.cast(vocabulary.ids.dtype, strict=False)
        if numbers.null_count() > ids.null_count():
            wrong = ids.filter(numbers.is_null())[0]
            raise ConfigError(f"the ids of this run are integers, found {wrong!r}")
        return numbers
    return ids
