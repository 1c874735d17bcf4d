"""LanceDB, embedded: tables ``NAME`` (id, vector) and ``NAME_users``, and which versions to read.

Lance keeps every version of a table, by number. An export overwrites both tables, verifies the new
versions at their numbers, and only then points ``DIR/recclr/NAME/CURRENT`` at the manifest that
holds the numbers: one rename moves both tables. Readers that open a table without recclr see its
latest version, or check out the tag ``recclr-VERSION``; what is tagged, Lance never cleans up.

Search is flat: no index, every item compared. Lance's distance is 1 - dot in float32, too coarse
for small scores, so a few more items than needed are fetched and scored again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from recclr.data.log import Csr
from recclr.errors import ConfigError, RecclrError, StoreError, require
from recclr.export.arrow import ids_of, to_table, vectors_of
from recclr.export.bundle import EmbeddingBundle, require_name
from recclr.export.lance_search import nearest
from recclr.export.manifest import Manifest, is_version, read_manifest
from recclr.export.store import Side, Store
from recclr.files import (
    clear_errors,
    fault_point,
    read_pointer,
    require_space,
    require_writable,
    write_json_atomic,
    write_pointer,
)
from recclr.ranking import TopK

CURRENT, ID, VECTOR = "CURRENT", "id", "vector"
_OURS = "recclr"
_OWNER, _VERSION = b"recclr.name", b"recclr.version"
# Tagging makes empty folders of the percent-encoded name beside any other path (Lance 13, seen with
# LanceDB 0.40), or fails where it may not.
_TAGGABLE = re.compile(r"[A-Za-z0-9 /._+=@,:-]+")
_RUST = re.compile(r", /\S+\.rs:\d+.*", re.DOTALL)


# Users first: who reads the latest version of the items sees them change last.
_SIDES: tuple[Side, Side] = ("user", "item")


class LanceStore(Store):
    """Both tables, each at the version that the manifest names."""

    def __init__(self, location: Path, manifest: Manifest) -> None:
        self.location, self.manifest = location, manifest
        self.home = _manifests(location, manifest.name)
        self.where = f"{location}, table {manifest.name!r}"
        database = _connect(location)
        self._tables: dict[Side, Any] = {}
        for side in _SIDES:
            name = _table_name(manifest.name, side)
            with _explained(self.where):
                table = database.open_table(name)
                table.checkout(manifest.parts[name]["version"])
                note = table.schema.metadata or {}
            # Numbers start again when a table is dropped and made anew.
            if note.get(_VERSION) != manifest.version.encode():
                raise StoreError(
                    f"{location}: the table {name!r} was replaced since the export; export again"
                )
            self._tables[side] = table

    def read_ids(self, side: Side) -> pl.Series:
        dtype = self.manifest.item_id_type if side == "item" else self.manifest.user_id_type
        with _explained(self.where):
            table = self._tables[side].search().select([ID]).to_arrow()
        return ids_of(table, ID, dtype, self.where)

    def read_vectors(self, side: Side, rows: Tensor | None = None) -> Tensor:
        dim = self.manifest.embedding_dim
        if rows is None:
            with _explained(self.where):
                table = self._tables[side].search().select([VECTOR]).to_arrow()
            return vectors_of(table, VECTOR, dim, self.where)
        # Lance answers in an order of its own, and each row once.
        offsets, place = torch.unique(rows, return_inverse=True)
        with _explained(self.where):
            taken = self._tables[side].take_offsets(offsets.tolist()).to_arrow()
        vocabulary = self.items if side == "item" else self.users
        ids = ids_of(taken, ID, vocabulary.ids.dtype, self.where)
        found = torch.from_numpy(vocabulary.encode(ids))
        order = found.argsort()
        if not torch.equal(found[order].long(), offsets):
            raise StoreError(f"{self.where}: the rows of {side}s are not those that were asked for")
        return vectors_of(taken, VECTOR, dim, self.where)[order][place]

    def nearest(self, queries: Tensor, k: int, *, seen: Csr | None = None) -> TopK:
        return nearest(self._fetch, self.manifest, queries, k, seen)

    def num_bytes(self) -> int:
        folders = (_table_folder(self.location, self.manifest.name, side) for side in self._tables)
        paths = (path for folder in folders for path in folder.rglob("*"))
        return sum(path.stat().st_size for path in paths if path.is_file())

    def _fetch(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """See ``lance_search.Fetch``."""
        with _explained(self.where):
            found = (
                self._tables["item"]
                .search(list(queries.numpy()), vector_column_name=VECTOR)
                .distance_type("dot")
                .bypass_vector_index()
                .limit(count)
                .select([ID, VECTOR, "_distance"])
                .to_arrow()
            )
        ids = ids_of(found, ID, self.manifest.item_id_type, self.where)
        item_rows = torch.from_numpy(self.items.encode(ids)).long()
        query_rows = torch.zeros(len(ids), dtype=torch.int64)
        if "query_index" in found.column_names:
            query_rows = torch.tensor(found["query_index"].to_numpy()).long()
        vectors = vectors_of(found, VECTOR, self.manifest.embedding_dim, self.where)
        return query_rows, item_rows, vectors


class LanceDatabase:
    """A folder of LanceDB tables, ours among others."""

    def __init__(self, location: Path) -> None:
        self.location = location

    def live(self, name: str) -> LanceStore | None:
        require_name(name)
        folder = _manifests(self.location, name)
        version = read_pointer(folder / CURRENT)
        if version is None:
            return None
        return LanceStore(self.location, read_manifest(folder / f"{version}.json", "export again"))

    @contextmanager
    def staged(self, bundle: EmbeddingBundle) -> Iterator[LanceStore]:
        self._require_place()
        require_writable(self.location)
        require_space(self.location, 2 * bundle.num_bytes)
        database = _connect(self.location)
        before = [_Before.of(self.location, database, side, bundle) for side in _SIDES]
        folder = _manifests(self.location, bundle.name)
        try:
            with clear_errors(self.location):
                parts = {}
                for side in _SIDES:
                    number = self._write(database, side, bundle)
                    parts[_table_name(bundle.name, side)] = {"version": number}
                    fault_point(f"export.{side}s")
                manifest = Manifest.of(bundle, parts)
                yield LanceStore(self.location, manifest)
                for side in _SIDES:
                    _flush(_table_folder(self.location, bundle.name, side))
                write_json_atomic(folder / f"{bundle.version}.json", manifest.to_json())
                fault_point("export.point")
                write_pointer(folder / CURRENT, bundle.version)
        except BaseException:
            for earlier in before:
                # The first error is the one to tell; readers follow CURRENT in any case.
                with suppress(Exception):
                    earlier.restore(database)
            raise

    def _write(self, database: Any, side: Side, bundle: EmbeddingBundle) -> int:
        """The number of the version written."""
        name = _table_name(bundle.name, side)
        ids = bundle.item_ids if side == "item" else bundle.user_ids
        vectors = bundle.item_vectors if side == "item" else bundle.user_vectors
        note = {_OWNER.decode(): bundle.name, _VERSION.decode(): bundle.version}
        data = to_table(ids, vectors, id_column=ID, vector_column=VECTOR, note=note)
        with _explained(f"{self.location}, table {name!r}"):
            # Only an existing table is overwritten: Lance warns on stderr about a missing one.
            mode = "create" if _open(database, name) is None else "overwrite"
            table = database.create_table(name, data, mode=mode)
            number = int(table.version)
            if _TAGGABLE.fullmatch(str(self.location.absolute())):
                _set_tag(table, _tag(bundle.version), number)
        return number

    def _require_place(self) -> None:
        """A folder that is new, empty, or a database already."""
        with clear_errors(self.location):
            if not self.location.exists():
                return
            if not self.location.is_dir():
                raise ConfigError(f"{self.location} is a file; expected a folder for LanceDB")
            names = [path.name for path in self.location.iterdir() if path.name[0] != "."]
        tables = any(name.endswith(".lance") for name in names)
        if names and not tables and not _is_ours(self.location / _OURS):
            raise ConfigError(
                f"{self.location} is not empty and holds no LanceDB tables (found {names[0]!r}); "
                "choose an empty or new folder"
            )


class _Before:
    """How a table stood before an export, to put it back.

    Attributes:
        latest: number of its latest version; None if there was no table.
        tagged: number that the tag of the bundle's version stood at, None if nowhere.
    """

    def __init__(self, name: str, tag: str, latest: int | None, tagged: int | None) -> None:
        self.name, self.tag, self.latest, self.tagged = name, tag, latest, tagged

    @classmethod
    def of(cls, location: Path, database: Any, side: Side, bundle: EmbeddingBundle) -> _Before:
        """Raises ConfigError where a table of that name is not ours to overwrite."""
        name, tag = _table_name(bundle.name, side), _tag(bundle.version)
        with _explained(f"{_table_folder(location, bundle.name, side)} is no whole table"):
            table = _open(database, name)
        if table is None:
            return cls(name, tag, None, None)
        owner = (table.schema.metadata or {}).get(_OWNER)
        if owner != bundle.name.encode():
            raise ConfigError(
                f"{location}: the table {name!r} exists and is not an export named "
                f"{bundle.name!r}; it is left as it is: choose another name"
            )
        with _explained(f"{location}, table {name!r}"):
            return cls(name, tag, table.version, table.tags.list().get(tag, {}).get("version"))

    def restore(self, database: Any) -> None:
        if self.latest is None:
            database.drop_table(self.name)
            return
        table = database.open_table(self.name)
        if self.tagged is not None:
            table.tags.update(self.tag, self.tagged)
        elif self.tag in table.tags.list():
            table.tags.delete(self.tag)
        if table.version != self.latest:
            table.checkout(self.latest)
            table.restore()


def _connect(location: Path) -> Any:
    lancedb: Any = require("lancedb", "lancedb")
    with _explained(str(location)):
        return lancedb.connect(str(location))


def _open(database: Any, name: str) -> Any | None:
    """The table, or None. Its being listed proves nothing: a failed create leaves a bare name."""
    try:
        return database.open_table(name)
    except (ValueError, FileNotFoundError):
        return None


def _set_tag(table: Any, tag: str, version: int) -> None:
    if tag in table.tags.list():
        table.tags.update(tag, version)
    else:
        table.tags.create(tag, version)


def _tag(version: str) -> str:
    return f"recclr-{version}"


def _table_name(name: str, side: Side) -> str:
    return name if side == "item" else f"{name}_users"


def _table_folder(location: Path, name: str, side: Side) -> Path:
    return location / f"{_table_name(name, side)}.lance"


def _manifests(location: Path, name: str) -> Path:
    return location / _OURS / name


def _is_ours(folder: Path) -> bool:
    """Whether nothing but manifests lies there, maybe of an export that failed."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return folder.is_dir() and all(path.name == CURRENT or is_version(path.stem) for path in files)


def _flush(folder: Path) -> None:
    """Lance does not sync; without it a power cut could leave a pointer to what is not there."""
    with clear_errors(folder):
        for path in [folder.parent, folder, *folder.rglob("*")]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """LanceDB raises whatever its engine does, mostly RuntimeError with a trace of Rust in it."""
    try:
        yield
    except RecclrError:
        raise
    except Exception as error:
        reason = _RUST.sub("", str(error)).split("\n")[0]
        raise StoreError(f"{where}: LanceDB failed: {reason}") from error
