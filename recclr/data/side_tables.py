"""The tables of users and of items: one row per id, other columns as they came."""

from __future__ import annotations

from typing import Any

import polars as pl

from recclr.data.ids import canonical_ids
from recclr.data.tables import load_table, require_columns
from recclr.errors import DataError
from recclr.settings import DataSettings


def read_side_table(
    source: Any, kind: str, settings: DataSettings, notes: list[str]
) -> pl.DataFrame | None:
    """The table of users or items, its key column under the canonical name.

    Args:
        source: path, frame, or None for no table.
        kind: ``user`` or ``item``.
        settings: the key is ``columns.user`` / ``columns.item``; rows without an id and rows of an
            id that an earlier row has are bad rows, refused or dropped by ``bad_rows``.
        notes: what was dropped is appended.

    Raises:
        DataError: no key column, ids as floats, or bad rows.
    """
    if source is None:
        return None
    name, key = f"{kind}s", f"{kind}_id"
    column: str = getattr(settings.columns, kind)
    text = (column,) if settings.id_type == "string" else ()
    table = load_table(source, name=name, text=text)
    require_columns(table, {column: f"data.columns.{kind}"}, name=name)
    if column != key and key in table.columns:
        raise DataError(
            f"{name}: {table.label} has both {column!r} (from data.columns.{kind}) and {key!r}; "
            "rename or drop one"
        )
    where = f"{table.label}: column {column!r}"
    as_text = settings.id_type == "string"
    ids = canonical_ids(table.frame[column], where=where, as_text=as_text).alias(key)
    frame = table.frame.with_columns(ids.alias(column)).rename({column: key})
    bad = ids.is_null() | ~ids.is_first_distinct()
    if not bad.any():
        return frame
    num_bad = int(bad.sum())
    rows = pl.int_range(len(ids), dtype=pl.UInt32, eager=True).filter(bad)
    problem = (
        f"{where}: {num_bad:,} of {len(ids):,} rows have no id or one that an earlier row has "
        f"({table.name_rows(rows)}, from 0)"
    )
    if settings.bad_rows == "refuse" or num_bad / len(ids) > settings.max_bad_share:
        raise DataError(
            f"{problem}; one row per {kind} is expected; mend them, or set data.bad_rows = 'drop' "
            f"(first row stays; up to data.max_bad_share = {settings.max_bad_share:.2%})"
        )
    notes.append(f"{problem}; dropped")
    return frame.filter(~bad)
