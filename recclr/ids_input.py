"""Ids from the command line and tables back to files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from recclr.data.tables import read_table
from recclr.data.vocabulary import Vocabulary
from recclr.errors import ConfigError, DataError
from recclr.files import write_bytes_atomic


def read_ids(
    listed: str | None, source: str | None, vocabulary: Vocabulary, column: str
) -> pl.Series | None:
    """Ids that a command was given, in the type of the vocabulary; None if it was given none.

    Args:
        listed: ids separated by commas. source: path of a table that holds them.
        column: their column in it; a table of one column may name it as it likes.

    Raises:
        ConfigError: both were given, or a listed id is no number where ids are numbers.
        DataError: the table has no such column.
    """
    if listed is not None and source is not None:
        raise ConfigError("give the ids either on the command line or in a file, not both")
    if listed is not None:
        parts = [part.strip() for part in listed.split(",") if part.strip()]
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
    return _typed(ids, vocabulary)


def write_rows(
    frame: pl.DataFrame, out: Path | None, *, show: Callable[[Any], None], as_json: bool
) -> None:
    """Write a result to a file by its ending, or show it.

    Raises:
        ConfigError: an ending that is not known. StoreError: no space or no permission.
    """
    if out is None:
        show(frame.to_dicts() if as_json else frame)
        return
    buffer = io.BytesIO()
    if out.suffix == ".parquet":
        frame.write_parquet(buffer)
    elif out.suffix == ".csv":
        frame.write_csv(buffer)
    elif out.suffix in (".jsonl", ".ndjson"):
        frame.write_ndjson(buffer)
    else:
        raise ConfigError(f"--out {out}: expected a name that ends in .parquet, .csv or .jsonl")
    write_bytes_atomic(out, buffer.getvalue())


def _typed(ids: pl.Series, vocabulary: Vocabulary) -> pl.Series:
    if ids.dtype == pl.String and vocabulary.ids.dtype.is_integer():
        numbers = ids.cast(vocabulary.ids.dtype, strict=False)
        if numbers.null_count() > ids.null_count():
            wrong = ids.filter(numbers.is_null())[0]
            raise ConfigError(f"expected ids of type {vocabulary.ids.dtype}, found {wrong!r}")
        return numbers
    return ids
