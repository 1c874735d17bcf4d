"""Raw ids and their dense indices.

Memory follows the number of distinct ids, never the largest of them, and ids stay what they were:
integers never pass through floats, strings are compared byte by byte.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from recclr.data.ids import canonical_ids
from recclr.errors import CheckpointError, DataError, ShapeError
from recclr.files import write_bytes_atomic

_MAX_IDS = (1 << 31) - 1
_COLUMNS = {"id", "idx", "count"}


class Vocabulary:
    """Distinct raw ids, each with its dense index (its place) and its count in train.

    Args:
        ids: [n] integers or strings, distinct, none null; index i is the id at place i.
        counts: int64 [n], train rows of each id; None for all zero.

    Raises:
        DataError: a null, a repeated id, another type, or 2^31 ids and more.
    """

    def __init__(self, ids: pl.Series, counts: NDArray[np.int64] | None = None) -> None:
        self.ids = canonical_ids(ids, where="the vocabulary").rename("id")
        if self.ids.null_count() or self.ids.n_unique() < len(self.ids):
            raise DataError("a vocabulary needs distinct ids, found nulls or repeated ones")
        if len(self.ids) > _MAX_IDS:
            raise DataError(f"a vocabulary holds at most {_MAX_IDS:,} ids, found {len(ids):,}")
        self.counts = np.zeros(len(ids), np.int64) if counts is None else counts
        if self.counts.shape != (len(ids),):
            raise ShapeError(f"expected one count per id ({len(ids)}), found {self.counts.shape}")

    @classmethod
    def of(cls, ids: pl.Series) -> Vocabulary:
        """The distinct ids of a column in order of first appearance, counted; nulls left out."""
        distinct = canonical_ids(ids, where="the vocabulary").drop_nulls()
        whole = cls(distinct.unique(maintain_order=True))
        return whole.counted(distinct)

    def counted(self, train_ids: pl.Series) -> Vocabulary:
        """The same ids with the counts of ``train_ids``; ids that are not known count nowhere."""
        idx = self.encode(train_ids)
        return self.with_counts(np.bincount(idx[idx >= 0], minlength=len(self)))

    def with_counts(self, counts: NDArray[np.int64]) -> Vocabulary:
        """The same ids with other counts: int64 [n]."""
        return Vocabulary(self.ids, counts.astype(np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self):,} ids of type {self.ids.dtype})"

    def encode(self, ids: pl.Series) -> NDArray[np.int32]:
        """Index of each id, int32 [n]; -1 for an id that is not known, or null.

        Integers of any width are compared by value; an integer too large for the vocabulary's
        type is unknown.

        Raises:
            DataError: strings are looked up among integers, integers among strings, or floats.
        """
        if ids.null_count() == len(ids):
            return np.full(len(ids), -1, np.int32)
        wanted = canonical_ids(ids, where=f"the column {ids.name!r} to look up")
        if len(self) and wanted.dtype.is_integer() != self.ids.dtype.is_integer():
            raise DataError(
                f"the column {ids.name!r} to look up holds {wanted.dtype}, the vocabulary "
                f"{self.ids.dtype}; give ids of the type that the log was read with"
            )
        known = pl.DataFrame({"id": self.ids, "idx": np.arange(len(self), dtype=np.int32)})
        looked_up = pl.DataFrame({"id": wanted.cast(self.ids.dtype, strict=False)})
        joined = looked_up.join(known, on="id", how="left", maintain_order="left")
        return np.array(joined["idx"].fill_null(-1).to_numpy(), dtype=np.int32)

    def decode(self, idx: ArrayLike) -> pl.Series:
        """The raw ids at the given indices, in the caller's type; null for -1.

        Args:
            idx: integers [n], each at least -1 and below ``len(self)``.

        Raises:
            ShapeError: an index is out of range, or not an integer.
        """
        places = np.atleast_1d(np.asarray(idx))
        if not len(places):
            return self.ids.clear()
        if places.ndim != 1 or not np.issubdtype(places.dtype, np.integer):
            raise ShapeError(f"indices must be integers [n], found {places.dtype} {places.shape}")
        if places.min() < -1 or places.max() >= len(self):
            raise ShapeError(
                f"indices must lie between -1 and {len(self) - 1}, "
                f"found {places.min()} to {places.max()}"
            )
        return gather(self.ids, places.astype(np.int64))

    def save(self, path: Path | str) -> None:
        """Write Parquet with the columns id, idx and count; whole or not at all.

        Raises:
            StoreError: no space or no permission.
        """
        buffer = io.BytesIO()
        pl.DataFrame(
            {"id": self.ids, "idx": np.arange(len(self), dtype=np.int32), "count": self.counts}
        ).write_parquet(buffer)
        write_bytes_atomic(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: Path | str) -> Vocabulary:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: the file is missing, damaged or no vocabulary.
        """
        try:
            frame = pl.read_parquet(io.BytesIO(Path(path).read_bytes()))
            if set(frame.columns) != _COLUMNS or not frame["idx"].dtype.is_integer():
                raise DataError(f"expected the columns id, idx and count, found {frame.schema}")
            if not np.array_equal(frame["idx"].to_numpy(), np.arange(frame.height)):
                raise DataError("the column idx does not count from 0 without gaps")
            counts = frame["count"].cast(pl.Int64)
            if counts.null_count() or (counts < 0).any():
                raise DataError("the column count holds nulls or negative numbers")
            return cls(frame["id"], np.array(counts.to_numpy()))
        except (
            OSError,
            DataError,
            ShapeError,
            TypeError,
            ValueError,
            pl.exceptions.PolarsError,
            pl.exceptions.PanicException,
        ) as error:
            raise CheckpointError(f"{path} is no whole vocabulary: {error}") from error


def gather(values: pl.Series, rows: NDArray[np.int64]) -> pl.Series:
    """The values at ``rows`` [n], null where a row is -1; any dtype."""
    if not (rows < 0).any():
        return values.gather(rows)
    with_null = values.extend_constant(None, 1)
    return with_null.gather(np.where(rows < 0, len(values), rows))
