"""Parquet files with a manifest: DIR/NAME/<version>/ and a pointer CURRENT beside the versions."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any, Self

import polars as pl
import pyarrow.parquet as pq
from torch import Tensor

from recclr.errors import ConfigError, RecclrError, StoreError
from recclr.export.bundle import EmbeddingBundle, require_name
from recclr.export.vectors import from_arrow, to_arrow
from recclr.files import (
    fault_point,
    new_folder,
    read_pointer,
    require_space,
    require_writable,
    sha256_of,
    write_bytes_atomic,
    write_json_atomic,
    write_pointer,
)
from recclr.topk import top_k

_CURRENT, _MANIFEST = "CURRENT", "manifest.json"
_TABLES = ("items", "users")


class ParquetStore:
    """See ``store.Store``. Earlier versions stay where they are; deleting them is the caller's."""

    def __init__(self, root: Path, version: str | None) -> None:
        self.root, self.version = root, version

    @classmethod
    def create(cls, location: str, name: str) -> Self:
        require_name(name)
        root = Path(location) / name
        if root.exists() and not root.is_dir():
            raise ConfigError(f"{root} is a file; expected a folder")
        require_writable(root)
        return cls(root, None)

    @classmethod
    def open(cls, location: str, name: str) -> Self:
        require_name(name)
        root = Path(location) / name
        version = read_pointer(root / _CURRENT)
        if version is None:
            raise StoreError(f"{root} holds no embeddings: {_CURRENT} is missing or damaged")
        return cls(root, version)

    @property
    def folder(self) -> Path:
        assert self.version is not None, "nothing was staged or opened"
        return self.root / self.version

    @property
    def manifest(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / _MANIFEST).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.folder / _MANIFEST} cannot be read: {error}") from error
        return found

    def stage(self, bundle: EmbeddingBundle) -> None:
        manifest = bundle.manifest()
        self.version = manifest["version"]
        if self.folder.exists():
            try:
                if self._intact():
                    return
            except RecclrError:
                pass
            # Content decides the name, so what stands there is this version, damaged.
            shutil.rmtree(self.folder)
        tables = {
            "items": to_arrow(bundle.item_ids, bundle.item_vectors),
            "users": to_arrow(bundle.user_ids, bundle.user_vectors),
        }
        require_space(self.root, sum(table.nbytes for table in tables.values()))
        with new_folder(self.folder) as folder:
            for name, table in tables.items():
                buffer = io.BytesIO()
                pq.write_table(table, buffer, compression="zstd")
                write_bytes_atomic(folder / f"{name}.parquet", buffer.getvalue())
                fault_point("export.table")
            files = {f"{name}.parquet": sha256_of(folder / f"{name}.parquet") for name in _TABLES}
            write_json_atomic(folder / _MANIFEST, manifest | {"sha256": files})

    def flip(self) -> None:
        fault_point("export.flip")
        write_pointer(self.root / _CURRENT, self.folder.name)

    def discard(self) -> None:
        if read_pointer(self.root / _CURRENT) != self.version:
            shutil.rmtree(self.folder, ignore_errors=True)

    def items(self) -> tuple[pl.Series, Tensor]:
        return self._table("items")

    def users(self, ids: pl.Series | None = None) -> tuple[pl.Series, Tensor]:
        found, vectors = self._table("users")
        if ids is None:
            return found, vectors
        rows = found.is_in(ids.cast(found.dtype, strict=False).implode()).arg_true()
        return found.gather(rows), vectors[rows.to_torch().long()]

    def search(self, queries: Tensor, k: int) -> list[tuple[pl.Series, Tensor]]:
        ids, vectors = self.items()
        found = top_k(queries, vectors, k)
        answers = []
        for rows, scores in zip(found.item_idx, found.scores, strict=True):
            kept = rows >= 0
            answers.append((ids.gather(rows[kept].numpy()), scores[kept]))
        return answers

    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def _intact(self) -> bool:
        """Whether every file is the one that the manifest was written for."""
        digests = self.manifest.get("sha256", {})
        return all(
            (self.folder / f"{name}.parquet").is_file()
            and sha256_of(self.folder / f"{name}.parquet") == digests.get(f"{name}.parquet")
            for name in _TABLES
        )

    def _table(self, name: str) -> tuple[pl.Series, Tensor]:
        path = self.folder / f"{name}.parquet"
        digests = self.manifest.get("sha256", {})
        if not path.is_file() or sha256_of(path) != digests.get(path.name):
            raise StoreError(f"{path} is missing or damaged (its SHA-256 is not the manifest's)")
        return from_arrow(pq.read_table(path), int(self.manifest["embedding_dim"]))
