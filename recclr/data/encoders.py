"""Encoders of discrete features: one category, lists of categories, text.

An encoder is what was fitted on train rows, a plain value that goes to JSON and back and encodes
any later table in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from recclr.data.column import Column, as_lists, as_texts
from recclr.data.log import CategoricalColumn, Csr, RaggedColumn
from recclr.data.text import distinct_in_rows, hash_buckets, kept_values, text_buckets
from recclr.data.vocabulary import Vocabulary
from recclr.errors import DataError

MAX_CATEGORIES = 100_000
"""Most categories that get a row each without being asked for by ``min_count``."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CategorySpace:
    """Category text -> index; one space may serve several features of both towers.

    Attributes:
        cardinality: indices are below it; 0 is missing or unknown.
        categories: index - 1 -> category; None where categories are hashed instead.
    """

    cardinality: int
    categories: Vocabulary | None

    @classmethod
    def hashed(cls, buckets: int) -> CategorySpace:
        """``buckets`` indices in all, of which 0 is for missing."""
        return cls(buckets, None)

    @classmethod
    def of(cls, categories: Sequence[str] | pl.Series) -> CategorySpace:
        vocabulary = Vocabulary(pl.Series(categories, dtype=pl.String))
        return cls(len(vocabulary) + 1, vocabulary)

    @classmethod
    def fit(cls, columns: Sequence[Column], *, min_count: int) -> CategorySpace:
        """The categories of train rows, the most frequent first, then by text.

        Args:
            columns: train rows of each feature that shares the space; lists where there are some.
            min_count: a category of fewer rows, over all columns, is unknown.

        Raises:
            DataError: more than ``MAX_CATEGORIES``, and ``min_count`` is 1.
        """
        counted = [_row_counts(column) for column in columns]
        counts = pl.concat(counted).group_by("text").agg(pl.col("count").sum())
        counts = counts.filter(pl.col("count") >= min_count)
        if counts.height > MAX_CATEGORIES and min_count == 1:
            raise DataError(
                f"{columns[0].label()} has {counts.height:,} categories in train, and each would "
                f"get a vector of its own; hash them with buckets (for example buckets = "
                f"{MAX_CATEGORIES}), or set min_count = 2 or more to keep the frequent ones"
            )
        counts = counts.sort(["count", "text"], descending=[True, False])
        return cls.of(counts["text"])

    def encode(self, texts: pl.Series) -> NDArray[np.int64]:
        """Index of each String, int64 [n]; 0 for null and unknown."""
        if self.categories is not None:
            return self.categories.encode(texts).astype(np.int64) + 1
        indices = np.zeros(len(texts), dtype=np.int64)
        present = texts.is_not_null()
        buckets = hash_buckets(texts.filter(present), self.cardinality - 1)
        indices[present.to_numpy()] = buckets + 1
        return indices

    def to_json(self) -> dict[str, Any]:
        if self.categories is None:
            return {"buckets": self.cardinality}
        return {"categories": self.categories.ids.to_list()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CategorySpace:
        if "buckets" in data:
            return cls.hashed(int(data["buckets"]))
        return cls.of([str(category) for category in data["categories"]])


@dataclass(frozen=True, eq=False)
class CategoryEncoder:
    """One category per row."""

    kind: ClassVar[str] = "categorical"
    column: str
    space: CategorySpace

    def encode(self, column: Column) -> CategoricalColumn:
        indices = self.space.encode(as_texts(column)).astype(np.int32)
        return CategoricalColumn(torch.from_numpy(indices), self.space.cardinality)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "column": self.column, **self.space.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CategoryEncoder:
        return cls(str(data["column"]), CategorySpace.from_json(data))


@dataclass(frozen=True, eq=False)
class MultiHotEncoder:
    """Any number of categories per row, each once; those unknown are left out.

    A column of plain values counts as lists of one.
    """

    kind: ClassVar[str] = "multi_hot"
    column: str
    space: CategorySpace

    def encode(self, column: Column) -> RaggedColumn:
        _warn_of_joined_lists(column)
        elements, rows = as_lists(column)
        indices = self.space.encode(elements)
        known = indices > 0
        csr = distinct_in_rows(
            rows[known],
            indices[known],
            num_rows=len(column.values),
            cardinality=self.space.cardinality,
        )
        return RaggedColumn(csr, self.space.cardinality)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "column": self.column, **self.space.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MultiHotEncoder:
        return cls(str(data["column"]), CategorySpace.from_json(data))


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """Words, pairs of words and character 3-grams, hashed; see ``text``.

    Attributes:
        known: bool [buckets]; terms of the others, whose vectors nothing has taught, are left out.
            None where all are known.
    """

    kind: ClassVar[str] = "text"
    column: str
    buckets: int
    known: NDArray[np.bool_] | None = None

    @staticmethod
    def known_terms(
        columns: Sequence[Column], buckets: int, *, min_count: int
    ) -> NDArray[np.bool_]:
        """Buckets that terms of at least ``min_count`` rows fall into, over all columns."""
        counts = np.zeros(buckets, dtype=np.int64)
        for column in columns:
            counts += np.bincount(_terms(column, buckets).values.numpy(), minlength=buckets)
        known: NDArray[np.bool_] = counts >= min_count
        return known

    def encode(self, column: Column) -> RaggedColumn:
        csr = _terms(column, self.buckets)
        if self.known is not None:
            csr = kept_values(csr, self.known)
        return RaggedColumn(csr, self.buckets)

    def to_json(self) -> dict[str, Any]:
        told = {"kind": self.kind, "column": self.column, "buckets": self.buckets}
        return (
            told
            if self.known is None
            else told | {"known": np.packbits(self.known).tobytes().hex()}
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TextEncoder:
        buckets, known = int(data["buckets"]), None
        if "known" in data:
            bits = np.frombuffer(bytes.fromhex(str(data["known"])), dtype=np.uint8)
            known = np.unpackbits(bits)[:buckets].astype(bool)
            if len(known) != buckets:
                raise ValueError(f"{buckets} buckets, but {len(known)} bits of which are known")
        return cls(str(data["column"]), buckets, known)


def _terms(column: Column, buckets: int) -> Csr:
    values = column.values
    if not isinstance(values.dtype, (pl.String, pl.Categorical, pl.Enum, pl.Null)):
        raise column.wrong_type("strings")
    return text_buckets(values.cast(pl.String), buckets)


def _row_counts(column: Column) -> pl.DataFrame:
    """Rows per category: columns text, count."""
    if column.kind != "multi_hot":
        return as_texts(column).drop_nulls().alias("text").value_counts()
    elements, rows = as_lists(column)
    distinct = elements.unique().alias("text")
    codes = Vocabulary(distinct).encode(elements).astype(np.int64)
    once = distinct_in_rows(
        rows, codes, num_rows=len(column.values), cardinality=max(len(distinct), 1)
    )
    counts = np.bincount(once.values.numpy(), minlength=len(distinct))
    return pl.DataFrame({"text": distinct, "count": counts.astype(np.uint32)})


def _warn_of_joined_lists(column: Column) -> None:
    """CSV has no lists: "Action|Comedy" would silently become one category of its own."""
    if column.values.dtype != pl.String:
        return
    share = column.values.str.contains("|", literal=True).mean()
    if isinstance(share, float) and share > 0.1:
        _logger.warning(
            "%s holds plain strings, of which %.0f %% contain '|'; each whole string is taken as "
            "one category; give lists, for example with str.split('|')",
            column.label(),
            100 * share,
        )
