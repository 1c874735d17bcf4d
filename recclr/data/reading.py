"""From tables to a ``Log``: in memory, or piece by piece where they do not fit."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import polars as pl

from recclr.data.check import CleanEvents, check_events, event_columns
from recclr.data.clean import filter_events
from recclr.data.files import closest
from recclr.data.ids import lookalikes, placeholders, stray_text
from recclr.data.interactions import Log, align_logs
from recclr.data.on_disk import clean_on_disk
from recclr.data.pieces import ParquetPieces
from recclr.data.side_tables import read_side_table
from recclr.data.spill import Disk
from recclr.data.tables import load_table
from recclr.errors import ConfigError, DataError
from recclr.files import require_space
from recclr.memory import available_bytes
from recclr.settings import ColumnSettings, DataSettings

# What reading takes for a row at its most, measured 62 with integers; and a column of texts beside.
_ROW_BYTES, _TEXT_BYTES = 65, 40
# Shares of the free memory: that all rows may take, and that those may that are sorted together.
_MOST, _AT_ONCE = 0.5, 0.2
_LEAST_ROWS = 1 << 20
# What a row of integers takes on the disk at most: two files of it, with all its columns; and for
# a column of texts beside, measured 90 with 36 letters.
_FILE_BYTES, _FILE_TEXT_BYTES = 80, 130


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


def read_log(
    settings: DataSettings, *, explicit: Sequence[str] = (), workspace: Path | None = None
) -> Log:
    """Read the log that ``settings`` describe; see ``read``.

    Args:
        workspace: folder for files without a name, where the log does not stay in memory; that of
            the system if not given.
    """
    paths = {name: getattr(settings, name) for name in ("events", "users", "items")}
    given = {name: path for name, path in paths.items() if path}
    return _read(settings, explicit=explicit, workspace=workspace, **given)


def read_held_out(log: Log, path: str) -> Log:
    """Rows of a file held out by hand, read as ``log`` was but for k-core and caps.

    Those two would drop held-out rows for being few. The tables are those of ``log``.
    """
    settings = replace(log.settings, events=path, k_core_user=0, k_core_item=0, max_per_user=None)
    workspace = None if log.disk is None else log.disk.folder
    return _assemble(settings, path, log.users, log.items, [], workspace)


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
    workspace: Path | None = None,
) -> Log:
    notes: list[str] = []
    user_table = read_side_table(users, "user", settings, notes)
    item_table = read_side_table(items, "item", settings, notes)
    log = _assemble(settings, events, user_table, item_table, notes, workspace)
    return _with_explicit(log, events, explicit, workspace) if explicit else log


def _with_explicit(log: Log, events: Any, kinds: Sequence[str], workspace: Path | None) -> Log:
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
        found = _assemble(settings, events, log.users, log.items, [], workspace)
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
    workspace: Path | None,
) -> Log:
    pieces = None
    if settings.resident is not True:
        pieces = ParquetPieces.of(events, name="events", keep=event_columns(settings))
    disk = None if pieces is None else disk_for(pieces, settings, workspace)
    if pieces is not None and disk is not None:
        num_bytes = pieces.num_rows * (
            _FILE_BYTES + _num_texts(pieces, settings) * _FILE_TEXT_BYTES
        )
        require_space(disk.folder, num_bytes)
        clean = clean_on_disk(pieces, settings, disk, users=users, items=items)
    else:
        clean = _clean_in_memory(settings, events, users, items)
    log = Log(
        events=clean.frame,
        users=users,
        items=items,
        settings=settings,
        steps=tuple(clean.steps),
        quarantine=clean.quarantine,
        disk=disk,
    )
    (log,) = align_logs([log])
    return replace(log, notes=(*notes, *clean.notes, *_id_notes(log)))


def _clean_in_memory(
    settings: DataSettings,
    events: Any,
    users: pl.DataFrame | None,
    items: pl.DataFrame | None,
) -> CleanEvents:
    columns = settings.columns
    text = (columns.user, columns.item) if settings.id_type == "string" else ()
    # Nobody holds what a step was given once it is done: rows are there twice at most, beside some
    # 30 bytes each of hashes and their order.
    return filter_events(
        check_events(
            load_table(events, name="events", keep=event_columns(settings), text=text),
            settings,
            users=users,
            items=items,
        ),
        settings,
    )


def _num_texts(pieces: ParquetPieces, settings: DataSettings) -> int:
    """How many of the two columns of ids are texts, or made so."""
    if settings.id_type == "string":
        return 2
    columns = (settings.columns.user, settings.columns.item)
    return sum(not pieces.schema.get(name, pl.Int64()).is_integer() for name in columns)


def disk_for(
    pieces: ParquetPieces, settings: DataSettings, workspace: Path | None = None
) -> Disk | None:
    """Where a log goes while it is read, as ``data.resident`` says; None: it stays in memory.

    Args:
        settings: of a log that need not stay there.
        workspace: see ``read_log``.
    """
    free = available_bytes()
    row_bytes = _ROW_BYTES + _num_texts(pieces, settings) * _TEXT_BYTES
    fits = free is None or pieces.num_rows * row_bytes <= _MOST * free
    if settings.resident == "auto" and fits:
        return None
    at_once = _LEAST_ROWS if free is None else int(_AT_ONCE * free) // row_bytes
    folder = Path(tempfile.gettempdir()) if workspace is None else workspace
    return Disk(folder, max(at_once, _LEAST_ROWS))


def _id_notes(log: Log) -> list[str]:
    notes = []
    for key, name, table in (("user_id", "users", log.users), ("item_id", "items", log.items)):
        used = log.events[key].unique(maintain_order=True)
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
