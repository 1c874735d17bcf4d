"""What every kind of store can do; a new kind implements these two classes and is listed in
``targets``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import polars as pl
import torch
from torch import Tensor

from recclr.data.log import Csr
from recclr.data.vocabulary import Vocabulary
from recclr.errors import DataError, ShapeError
from recclr.export.bundle import EmbeddingBundle
from recclr.export.manifest import Manifest
from recclr.ranking import TopK

Side = Literal["item", "user"]
Ids = Sequence[int | str]


class Store(ABC):
    """One version of exported embeddings, opened; what it reads never changes under its feet.

    Attributes:
        where: the place, for messages. home: what to remove when it is damaged.
        manifest: of this version.
    """

    where: str
    home: Path
    manifest: Manifest

    @abstractmethod
    def read_ids(self, side: Side) -> pl.Series:
        """All raw ids of a side; their order is that of the rows.

        Raises:
            StoreError: the store cannot be read, or is damaged.
        """

    @abstractmethod
    def read_vectors(self, side: Side, rows: Tensor | None = None) -> Tensor:
        """Vectors, float32 [M, D].

        Args:
            rows: int64 [M] in any order, with repeats; None for all in their order.
        """

    @abstractmethod
    def nearest(self, queries: Tensor, k: int, *, seen: Csr | None = None) -> TopK:
        """The items of largest dot product, exactly, as *rows* of ``read_ids("item")``.

        Args:
            queries: float32 [Q, D]. seen: Q rows of item rows to leave out.
        """

    @abstractmethod
    def num_bytes(self) -> int:
        """Disk space, earlier versions included where a store cannot tell them apart."""

    @cached_property
    def items(self) -> Vocabulary:
        """Item ids to rows, read once."""
        return Vocabulary(self.read_ids("item"))

    @cached_property
    def users(self) -> Vocabulary:
        """User ids to rows, read once."""
        return Vocabulary(self.read_ids("user"))

    def user_vectors(self, ids: pl.Series | Ids) -> Tensor:
        """A vector per user, float32 [Q, D]; unknown users and nulls get the vector for them.

        Raises:
            DataError: strings are looked up among integers, or integers among strings.
        """
        series = ids if isinstance(ids, pl.Series) else _series("user_id", ids)
        rows = torch.from_numpy(self.users.encode(series)).long()
        vectors = self.manifest.unknown_user_vector.repeat(len(rows), 1)
        known = rows >= 0
        if known.any():
            vectors[known] = self.read_vectors("user", rows[known])
        return vectors

    def search(
        self, vectors: Tensor, k: int, *, exclude: Sequence[Ids] | None = None
    ) -> tuple[list[list[int | str]], Tensor]:
        """The items of largest dot product with each query, exactly.

        Args:
            vectors: float32 [Q, D]. k: at least 1.
            exclude: raw item ids per query to leave out; unknown ones are passed over.

        Returns:
            Raw ids per query, best first, fewer than k where the items run out; scores float32
            [Q, K], -inf there.

        Raises:
            ShapeError: shapes do not fit. DataError: ids of another type than the store's.
        """
        self._check(vectors, k)
        seen = None if exclude is None else self._rows_of(exclude, len(vectors))
        found = self.nearest(vectors, k, seen=seen)
        counts = (found.item_idx >= 0).sum(1).tolist()
        flat = iter(self.items.decode(found.item_idx[found.item_idx >= 0].numpy()).to_list())
        return [[next(flat) for _ in range(count)] for count in counts], found.scores

    def _check(self, vectors: Tensor, k: int) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.manifest.embedding_dim or k < 1:
            raise ShapeError(
                f"expected queries [Q, {self.manifest.embedding_dim}] and k >= 1, found "
                f"{tuple(vectors.shape)} and k = {k}"
            )
        if vectors.dtype != torch.float32:
            raise ShapeError(f"expected queries of float32, found {vectors.dtype}")
        if not vectors.isfinite().all():
            raise ShapeError("a query vector is not finite")

    def _rows_of(self, exclude: Sequence[Ids], num_queries: int) -> Csr:
        if len(exclude) != num_queries:
            raise ShapeError(f"expected {num_queries} lists to exclude, found {len(exclude)}")
        ids = _series("exclude", [item for items in exclude for item in items])
        lengths = torch.tensor([len(items) for items in exclude], dtype=torch.int64)
        queries = torch.arange(num_queries).repeat_interleave(lengths)
        rows = torch.from_numpy(self.items.encode(ids))
        return Csr.from_pairs(queries[rows >= 0], rows[rows >= 0], num_queries)


def _series(name: str, ids: Ids) -> pl.Series:
    """Integers or strings as they are; only a mixture has no type of its own."""
    try:
        return pl.Series(name, list(ids))
    except (TypeError, OverflowError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"{name}: expected ids of one type, all integers or all strings, found a mixture"
        ) from error


class Destination(Protocol):
    """A place of one kind, such as a folder, that holds stores by name."""

    location: Path

    def live(self, name: str) -> Store | None:
        """What readers of ``name`` see now; None if nothing was exported there yet.

        Raises:
            ConfigError: the place holds one other name. StoreError: it cannot be read.
        """
        ...

    def staged(self, bundle: EmbeddingBundle) -> AbstractContextManager[Store]:
        """Write beside what is live and give it to the block to judge.

        When the block ends well, readers see the new version, in one step; if it raises, or the
        process dies, they see the previous one.

        Raises:
            ConfigError: the place is not ours to write. StoreError: the write failed.
        """
        ...
