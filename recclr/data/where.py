"""Which rows meet the conditions of ``data.where``, on columns of the events or of the tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import polars as pl

from recclr.data.conditions import Condition, parse_condition
from recclr.data.files import closest
from recclr.data.ids import align_ids
from recclr.data.tables import Table
from recclr.errors import ConfigError, DataError


class Rows(Protocol):
    """The rows that are still in: source columns beside canonical ids, all of one length."""

    table: Table
    frame: pl.DataFrame
    users: pl.Series
    items: pl.Series


def where_masks(
    where: Mapping[str, str], rows: Rows, tables: Mapping[str, pl.DataFrame | None]
) -> Iterator[tuple[str, pl.Series]]:
    """For each condition its key and a Boolean mask of the rows that are in at that moment.

    Args:
        where: column -> condition. A name is looked for in the events, then in the tables;
            ``users.NAME``, ``items.NAME`` and ``events.NAME`` say which.
        rows: may shrink between two masks.
        tables: ``users`` and ``items`` with canonical key columns, or None. A row whose id is not
            in the table fails.

    Raises:
        ConfigError: a condition cannot be parsed or does not fit its column, or the column is in
            both tables.
        DataError: no table has the column.
    """
    # All are parsed before the first runs: a typing error must not wait for the data.
    conditions = {
        key: parse_condition(text, source=f"data.where.{key}") for key, text in where.items()
    }
    for key, condition in conditions.items():
        name, column = _find_column(key, rows, tables)
        table = tables.get(name)
        if table is None:
            yield key, condition.mask(rows.frame[column])
        else:
            yield key, _mask_of_table(rows, name, table, column, condition)


def _find_column(
    key: str, rows: Rows, tables: Mapping[str, pl.DataFrame | None]
) -> tuple[str, str]:
    columns = {"events": list(rows.frame.columns)}
    columns |= {name: list(table.columns) for name, table in tables.items() if table is not None}
    if key in columns["events"]:
        return "events", key
    having = [name for name in columns if key in columns[name]]
    if len(having) == 1:
        return having[0], key
    if having:
        raise ConfigError(
            f"data.where.{key}: the tables of users and items both have this column; write "
            f"'users.{key}' or 'items.{key}'"
        )
    name, _, column = key.partition(".")
    if column in columns.get(name, ()):
        return name, column
    columns["events"] = list(rows.table.columns)
    near = closest(key, [column for found in columns.values() for column in found])
    found_text = "; ".join(f"{name}: {', '.join(found)}" for name, found in columns.items())
    raise DataError(
        f"data.where.{key}: there is no column of this name; found {found_text}"
        + (f"; did you mean {near!r}?" if near else "")
    )


def _mask_of_table(
    rows: Rows, name: str, table: pl.DataFrame, column: str, condition: Condition
) -> pl.Series:
    key, ids = ("user_id", rows.users) if name == "users" else ("item_id", rows.items)
    passing = table.filter(condition.mask(table[column]))[key]
    if not len(passing) or ids.null_count() == len(ids):
        return pl.repeat(False, len(ids), dtype=pl.Boolean, eager=True)
    aligned = align_ids({"the events": ids, f"the table of {name}": passing})
    mine, theirs = aligned.values()
    return mine.is_in(theirs.implode()).fill_null(False)
