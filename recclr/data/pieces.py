"""A table of Parquet files that is read some rows at a time."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from recclr.data.files import format_of, resolve_files
from recclr.data.schema import joint_schema
from recclr.data.tables import Table, cast_to, in_folder, refuse_partial, unreadable


@dataclass(frozen=True)
class ParquetPieces:
    """Files whose rows are one table, none of which have been read.

    Attributes:
        files: in order. labels: what messages call them. heights: rows of each.
        columns: names of all, those not asked for as well. schema: types of those to read, which
            hold the values of every file.
        label: what to call the whole.
    """

    files: tuple[Path, ...]
    labels: tuple[str, ...]
    heights: tuple[int, ...]
    columns: tuple[str, ...]
    schema: dict[str, pl.DataType]
    label: str
    name: str

    @classmethod
    def of(cls, source: Any, *, name: str, keep: Collection[str]) -> ParquetPieces | None:
        """What the files say of themselves; None for a source that is not Parquet, or has nothing
        to read in pieces.

        Args:
            source, name, keep: see ``tables.load_table``.

        Raises:
            ConfigError, DataError: as ``load_table`` says.
        """
        if not isinstance(source, (str, os.PathLike)):
            return None
        files = resolve_files(os.fspath(source), name=name)
        if format_of(files[0]) != "parquet":
            return None
        labels = in_folder(files)
        schemas, heights = [], []
        for path in files:
            with unreadable(path, "parquet", name), path.open("rb") as opened:
                schemas.append(pl.read_parquet_schema(opened))
                opened.seek(0)
                heights.append(pq.read_metadata(opened).num_rows)
        columns = [tuple(schema) for schema in schemas]
        refuse_partial(labels, columns, keep, name)
        kept = [pl.Schema({c: t for c, t in s.items() if c in keep}) for s in schemas]
        if not any(kept) or not sum(heights):
            return None
        label = str(files[0])
        if len(files) > 1:
            label = f"{os.fspath(source)} ({len(files)} files)"
        return cls(
            files=tuple(files),
            labels=tuple(labels),
            heights=tuple(heights),
            columns=tuple(dict.fromkeys(column for found in columns for column in found)),
            schema=joint_schema(labels, kept, name),
            label=label,
            name=name,
        )

    @property
    def num_rows(self) -> int:
        return sum(self.heights)

    def tables(self, rows: int) -> Iterator[Table]:
        """All rows in order, at most so many at once; small files come together."""
        taken, room = list[tuple[int, int, int]](), rows
        for number, height in enumerate(self.heights):
            start = 0
            while start < height:
                count = min(room, height - start)
                taken.append((number, start, count))
                start, room = start + count, room - count
                if not room:
                    yield self._read(taken)
                    taken, room = [], rows
        if taken:
            yield self._read(taken)

    def _read(self, taken: list[tuple[int, int, int]]) -> Table:
        """Rows of files, as (file, first row, rows)."""
        frames = []
        for number, start, count in taken:
            path = self.files[number]
            with unreadable(path, "parquet", self.name):
                # A name is a name, whatever it holds.
                lazy = pl.scan_parquet(path, glob=False, hive_partitioning=False)
                own = [name for name in lazy.collect_schema() if name in self.schema]
                frames.append(cast_to(lazy.select(own).slice(start, count).collect(), self.schema))
        parts = tuple((self.labels[number], count) for number, _, count in taken)
        return Table(
            pl.concat(frames),
            self.columns,
            parts,
            self.label,
            first_row=taken[0][1],
            num_parts=len(self.files),
        )
