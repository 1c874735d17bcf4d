"""LanceDB, the embedded default: a table NAME of items, NAME_users, and NAME.json beside them.

Lance keeps every version of a table. NAME.json names the pair of versions that belong together,
and is replaced in one rename: readers that go through it never see items of one model and users of
another. A reader that opens the table directly sees the newest one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from recclr.errors import ConfigError, RecclrError, StoreError, require
from recclr.export.bundle import EmbeddingBundle, require_name
from recclr.export.vectors import from_arrow, to_arrow
from recclr.files import fault_point, require_space, require_writable, write_json_atomic

_IDS_PER_QUERY = 500


class LanceStore:
    """See ``store.Store``. Search is exact: no index is built, every vector is compared."""

    def __init__(self, root: Path, name: str, manifest: dict[str, Any] | None) -> None:
        self.root, self.name, self._manifest = root, name, manifest
        # It warns of every table that is not there yet, which is what a first export makes.
        os.environ.setdefault("LANCE_LOG", "error")
        library: Any = require("lancedb", "lancedb")
        with _as_store_error(root):
            self.database = library.connect(str(root))

    @classmethod
    def create(cls, location: str, name: str) -> Self:
        require_name(name)
        root = Path(location)
        if root.exists() and not root.is_dir():
            raise ConfigError(f"{root} is a file; expected a folder")
        require_writable(root)
        store = cls(root, name, None)
        if not _manifest_path(root, name).exists() and store._exists(name):
            raise ConfigError(
                f"{root} has a table {name!r} that recclr did not write; choose another --name"
            )
        return store

    @classmethod
    def open(cls, location: str, name: str) -> Self:
        require_name(name)
        path = _manifest_path(Path(location), name)
        try:
            manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{location} holds no embeddings named {name!r}: {path.name} cannot be read "
                f"({error})"
            ) from error
        return cls(Path(location), name, manifest)

    @property
    def manifest(self) -> dict[str, Any]:
        assert self._manifest is not None, "nothing was staged or opened"
        return self._manifest

    def stage(self, bundle: EmbeddingBundle) -> None:
        manifest = bundle.manifest()
        tables = {
            self.name: to_arrow(bundle.item_ids, bundle.item_vectors),
            f"{self.name}_users": to_arrow(bundle.user_ids, bundle.user_vectors),
        }
        require_space(self.root, sum(table.nbytes for table in tables.values()))
        versions: dict[str, int] = {}
        # Filled as the tables are written, so that half a stage can be discarded as well.
        self._manifest = manifest | {"tables": versions}
        with _as_store_error(self.root):
            for name, table in tables.items():
                labelled = table.replace_schema_metadata({"recclr_version": manifest["version"]})
                written = self.database.create_table(name, labelled, mode="overwrite")
                versions[name] = written.version
                fault_point("export.table")

    def flip(self) -> None:
        fault_point("export.flip")
        write_json_atomic(_manifest_path(self.root, self.name), self.manifest)

    def discard(self) -> None:
        path = _manifest_path(self.root, self.name)
        shown = json.loads(path.read_text("utf-8"))["tables"] if path.exists() else {}
        with _as_store_error(self.root):
            for name in self.manifest["tables"]:
                if name in shown:
                    table = self.database.open_table(name)
                    table.checkout(shown[name])
                    table.restore()
                else:
                    self.database.drop_table(name)

    def items(self) -> tuple[pl.Series, Tensor]:
        with _as_store_error(self.root):
            return self._decoded(self._table(self.name).to_arrow())

    def users(self, ids: pl.Series | None = None) -> tuple[pl.Series, Tensor]:
        with _as_store_error(self.root):
            table = self._table(f"{self.name}_users")
            if ids is None:
                return self._decoded(table.to_arrow())
            wanted = ids.unique(maintain_order=True).drop_nulls()
            parts = []
            for start in range(0, len(wanted), _IDS_PER_QUERY):
                chunk = wanted.slice(start, _IDS_PER_QUERY)
                parts.append(table.search().where(_one_of(chunk)).limit(len(chunk)).to_arrow())
            found = pa.concat_tables(parts) if parts else table.to_arrow().slice(0, 0)
            return self._decoded(found)

    def search(self, queries: Tensor, k: int) -> list[tuple[pl.Series, Tensor]]:
        with _as_store_error(self.root):
            table = self._table(self.name)
            return [self._answer(table, query, k) for query in queries]

    def size_bytes(self) -> int:
        folders = [self.root / f"{name}.lance" for name in self.manifest["tables"]]
        files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files)

    def _answer(self, table: Any, query: Tensor, k: int) -> tuple[pl.Series, Tensor]:
        found = (
            table.search(query.numpy())
            .distance_type("dot")
            .bypass_vector_index()
            .limit(k)
            .to_arrow()
        )
        # Lance gives 1 - dot, rounded; the vectors it returns give the score in full precision.
        ids = pl.Series("id", found["id"])
        dim = int(self.manifest["embedding_dim"])
        values = found["vector"].combine_chunks().values.to_numpy(zero_copy_only=False)
        scores = torch.from_numpy(values.reshape(-1, dim).copy()) @ query
        idx = torch.from_numpy(found["idx"].to_numpy().copy())
        order = idx.argsort(stable=True)
        order = order[scores[order].argsort(descending=True, stable=True)]
        return ids.gather(order.numpy()), scores[order]

    def _table(self, name: str) -> Any:
        table = self.database.open_table(name)
        table.checkout(int(self.manifest["tables"][name]))
        return table

    def _decoded(self, table: pa.Table) -> tuple[pl.Series, Tensor]:
        return from_arrow(table, int(self.manifest["embedding_dim"]))

    def _exists(self, name: str) -> bool:
        return (self.root / f"{name}.lance").exists()


def _manifest_path(root: Path, name: str) -> Path:
    return root / f"{name}.json"


def _one_of(ids: pl.Series) -> str:
    """A condition on ``id`` in SQL; a quote within an id is doubled, so no id ends the string."""
    if ids.dtype.is_integer():
        return f"id IN ({', '.join(str(int(value)) for value in ids)})"
    quoted = ("'" + str(value).replace("'", "''") + "'" for value in ids)
    return f"id IN ({', '.join(quoted)})"


@contextmanager
def _as_store_error(root: Path) -> Iterator[None]:
    """Whatever Lance raises, as the error of a store."""
    try:
        yield
    except RecclrError:
        raise
    except (OSError, RuntimeError, ValueError, pa.ArrowException) as error:
        room = ""
        if isinstance(error, OSError) and error.errno is not None:
            room = f" ({os.strerror(error.errno)})"
        raise StoreError(f"LanceDB at {root}: {error}{room}; nothing was shown") from error
