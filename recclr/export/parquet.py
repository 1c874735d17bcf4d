"""Parquet with a manifest: the source of truth, from which any other store can be filled.

``DIR/<version>/`` holds ``items.parquet`` (item_id, embedding), ``users.parquet`` (user_id,
embedding) and, written last, ``manifest.json``; ``DIR/CURRENT`` names the version to read. Earlier
versions stay.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from recclr.data.log import Csr
from recclr.errors import ConfigError, StoreError
from recclr.export.arrow import ids_of, to_table, vectors_of
from recclr.export.bundle import EmbeddingBundle
from recclr.export.manifest import Manifest, is_version, read_manifest
from recclr.export.store import Side, Store
from recclr.files import (
    clear_errors,
    fault_point,
    new_folder,
    read_pointer,
    require_space,
    sha256_of,
    write_json_atomic,
    write_pointer,
)
from recclr.ranking import TopK
from recclr.topk import top_k

CURRENT, MANIFEST, VECTORS = "CURRENT", "manifest.json", "embedding"
_FILES: dict[Side, str] = {"item": "items.parquet", "user": "users.parquet"}
_ROW_GROUP = 65_536


class ParquetStore(Store):
    """One version folder; each file is compared with its SHA-256 when it is first read."""

    def __init__(self, folder: Path) -> None:
        self.where, self.home = str(folder), folder
        self._advice = f"remove {folder} and export again"
        self.manifest = read_manifest(folder / MANIFEST, self._advice)
        # Each side is read once per instance; a cache on the method would outlive the instance.
        self._side = cache(self._read)

    def read_ids(self, side: Side) -> pl.Series:
        return self._side(side)[0]

    def read_vectors(self, side: Side, rows: Tensor | None = None) -> Tensor:
        vectors = self._side(side)[1]
        return vectors if rows is None else vectors[rows]

    def nearest(self, queries: Tensor, k: int, *, seen: Csr | None = None) -> TopK:
        return top_k(queries, self.read_vectors("item"), k, seen=seen)

    def num_bytes(self) -> int:
        return sum((self.home / name).stat().st_size for name in (*_FILES.values(), MANIFEST))

    def _read(self, side: Side) -> tuple[pl.Series, Tensor]:
        path, manifest = self.home / _FILES[side], self.manifest
        expected = manifest.parts.get(path.name, {}).get("sha256")
        try:
            if sha256_of(path) != expected:
                raise StoreError(
                    f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}; {self._advice}"
                )
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{path} cannot be read: {error}; {self._advice}") from error
        dtype = manifest.item_id_type if side == "item" else manifest.user_id_type
        return (
            ids_of(table, f"{side}_id", dtype, str(path)),
            vectors_of(table, VECTORS, manifest.embedding_dim, str(path)),
        )


class ParquetFolder:
    """A folder of versions."""

    def __init__(self, location: Path) -> None:
        self.location = location

    def live(self, name: str) -> ParquetStore | None:
        version = read_pointer(self.location / CURRENT)
        if version is None:
            return None
        store = ParquetStore(self.location / version)
        if store.manifest.name != name:
            raise ConfigError(
                f"{self.location} holds embeddings named {store.manifest.name!r}, not {name!r}; "
                "a folder holds one name, so choose that one or another folder"
            )
        return store

    @contextmanager
    def staged(self, bundle: EmbeddingBundle) -> Iterator[ParquetStore]:
        self._require_ours()
        folder = self.location / bundle.version
        with clear_errors(self.location):
            if os.path.lexists(folder):
                # An earlier version, or an export that was stopped before it was pointed to.
                yield ParquetStore(folder)
            else:
                require_space(folder, 2 * bundle.num_bytes)
                with new_folder(folder) as temporary:
                    _write(bundle, temporary)
                    yield ParquetStore(temporary)
            fault_point("export.point")
            write_pointer(self.location / CURRENT, bundle.version)

    def _require_ours(self) -> None:
        """A folder that is new, empty, or ours; nothing of anybody else's is mixed with."""
        with clear_errors(self.location):
            if not self.location.exists():
                return
            if not self.location.is_dir():
                raise ConfigError(f"{self.location} is a file; expected a folder for the export")
            entries = [path for path in self.location.iterdir() if path.name[0] != "."]
        # Damaged versions, and a pointer to one that was removed, are ours to mend.
        pointed = is_version(read_pointer(self.location / CURRENT) or "")
        if entries and not pointed and not any(_is_ours(path) for path in entries):
            raise ConfigError(
                f"{self.location} is not empty and holds no export of recclr (found "
                f"{entries[0].name!r}); choose an empty or new folder"
            )


def _is_ours(folder: Path) -> bool:
    return is_version(folder.name) and (folder / MANIFEST).is_file()


def _write(bundle: EmbeddingBundle, folder: Path) -> None:
    sides: dict[Side, tuple[pl.Series, Tensor]] = {
        "item": (bundle.item_ids, bundle.item_vectors),
        "user": (bundle.user_ids, bundle.user_vectors),
    }
    parts = {}
    for side, (ids, vectors) in sides.items():
        path = folder / _FILES[side]
        table = to_table(
            ids,
            vectors,
            id_column=f"{side}_id",
            vector_column=VECTORS,
            note={"recclr": bundle.version},
        )
        pq.write_table(
            table,
            path,
            row_group_size=_ROW_GROUP,
            compression="zstd",
            # Measured in stores.md §4: smaller and faster to read than plain pages; a dictionary
            # of floats makes the file larger and slower.
            use_dictionary=False,
            use_byte_stream_split=[f"{VECTORS}.list.element"],
        )
        fault_point(f"export.{side}s")
        parts[path.name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    write_json_atomic(folder / MANIFEST, Manifest.of(bundle, parts).to_json())
