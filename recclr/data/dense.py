"""Encoders of dense features: numbers and pretrained vectors, each with a flag for "missing".

The flag is the last coordinate: 1 where there is no value (the others are then 0), else 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from recclr.data.column import Column, as_numbers
from recclr.data.log import DenseColumn
from recclr.errors import DataError

_LIMIT = 10.0
_MAX_KNOTS = 1000
_CHUNK_ROWS = 1 << 15
_FLOAT16_MAX = 65_504.0


@dataclass(frozen=True)
class StandardNumberEncoder:
    """(value - mean) / deviation of the train rows, clipped to ±10.

    A network is not asked beyond ten deviations, where it has seen next to nothing. A column that
    is constant in train tells nothing: all its values become 0.
    """

    kind: ClassVar[str] = "numeric"
    column: str
    mean: float
    std: float

    @classmethod
    def fit(cls, column: Column) -> StandardNumberEncoder:
        values = _present(as_numbers(column))
        if not len(values) or values.min() == values.max():
            return cls(column.name, float(values[0]) if len(values) else 0.0, 0.0)
        return cls(column.name, float(values.mean()), float(values.std()))

    def encode(self, column: Column) -> DenseColumn:
        values = as_numbers(column)
        if self.std == 0.0:
            return _with_flag(np.where(np.isnan(values), np.nan, 0.0))
        with np.errstate(over="ignore"):
            scores = (values - self.mean) / self.std
        return _with_flag(np.clip(scores, -_LIMIT, _LIMIT))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "column": self.column, "mean": self.mean, "std": self.std}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StandardNumberEncoder:
        return cls(str(data["column"]), float(data["mean"]), float(data["std"]))


@dataclass(frozen=True)
class QuantileNumberEncoder:
    """The normal score of a value's rank among the train rows.

    Between at most 1,000 quantiles ranks are interpolated; equal values share the middle of their
    ranks; values outside the range of train get its ends (±3.3 at most).

    Attributes:
        knots: train values at even steps of rank, ascending; one where train is constant, none
            where all is missing.
    """

    kind: ClassVar[str] = "numeric"
    column: str
    knots: tuple[float, ...]

    @classmethod
    def fit(cls, column: Column) -> QuantileNumberEncoder:
        values = _present(as_numbers(column))
        if not len(values):
            return cls(column.name, ())
        if values.min() == values.max():
            return cls(column.name, (float(values[0]),))
        # Values as they are, not interpolated: a rounding error would part equal values.
        places = np.linspace(0, len(values) - 1, min(_MAX_KNOTS, len(values))).round()
        knots = np.sort(values)[places.astype(np.int64)]
        return cls(column.name, tuple(knots.tolist()))

    def encode(self, column: Column) -> DenseColumn:
        values = as_numbers(column)
        if len(self.knots) < 2:
            return _with_flag(np.where(np.isnan(values), np.nan, 0.0))
        knots = np.array(self.knots)
        steps = np.linspace(0.0, 1.0, len(knots))
        # From below and from above: their mean is the middle where several knots are equal.
        below = np.interp(values, knots, steps)
        above = 1.0 - np.interp(-values, -knots[::-1], steps)
        ranks = (below + above) / 2
        inside = (ranks * (len(knots) - 1) + 0.5) / len(knots)
        return _with_flag(torch.special.ndtri(torch.from_numpy(inside)).numpy())

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "column": self.column, "knots": list(self.knots)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantileNumberEncoder:
        return cls(str(data["column"]), tuple(float(knot) for knot in data["knots"]))


@dataclass(frozen=True)
class VectorEncoder:
    """A pretrained vector, divided by the root mean square length of the train vectors.

    One number for all coordinates keeps every angle; vectors of unit length stay what they are.
    Stored as float16, width + 1 with the flag.
    """

    kind: ClassVar[str] = "vector"
    column: str
    width: int
    length: float

    @classmethod
    def fit(cls, column: Column) -> VectorEncoder:
        lengths = _list_lengths(column)
        lengths = lengths.filter(lengths > 0)
        if not len(lengths):
            raise DataError(
                f"{column.label()} holds no vector for any entity of train; leave the feature out"
            )
        # The most common width, and not the first, so that one bad row does not condemn the rest.
        width = int(lengths.mode().max())  # type: ignore[arg-type]
        squares, count = 0.0, 0
        for _, _, vectors in _vectors(column, width):
            squares += float(np.square(vectors, dtype=np.float64).sum())
            count += len(vectors)
        return cls(column.name, width, float(np.sqrt(squares / count)) or 1.0)

    def encode(self, column: Column) -> DenseColumn:
        result = np.zeros((len(column.values), self.width + 1), dtype=np.float16)
        result[:, -1] = 1.0
        for start, present, vectors in _vectors(column, self.width):
            scaled = vectors / np.float64(self.length)
            rows = start + np.flatnonzero(present)
            large = np.zeros(len(result), dtype=bool)
            large[rows] = (np.abs(scaled) > _FLOAT16_MAX).any(axis=1)
            if large.any():
                raise column.refusal(
                    large, "vectors some 65,000 times longer than those of train", "mend them"
                )
            result[rows, :-1] = scaled
            result[rows, -1] = 0.0
        return DenseColumn(torch.from_numpy(result))

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "column": self.column,
            "width": self.width,
            "length": self.length,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VectorEncoder:
        return cls(str(data["column"]), int(data["width"]), float(data["length"]))


def _present(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[~np.isnan(values)]


def _with_flag(values: NDArray[np.float64]) -> DenseColumn:
    """float32 [n, 2]: the value, 0 where NaN, and the flag."""
    missing = np.isnan(values)
    pair = np.stack([np.where(missing, 0.0, values), missing], axis=1)
    return DenseColumn(torch.from_numpy(pair.astype(np.float32)))


def _list_lengths(column: Column) -> pl.Series:
    """Length of each vector [n], null where there is none."""
    dtype = column.values.dtype
    if isinstance(dtype, pl.Null):
        return pl.Series([None] * len(column.values), dtype=pl.UInt32)
    inner = getattr(dtype, "inner", None)
    if not isinstance(dtype, (pl.List, pl.Array)) or inner is None or not inner.is_numeric():
        raise column.wrong_type("lists or arrays of numbers, all of one length")
    lists = column.values.arr.to_list() if isinstance(dtype, pl.Array) else column.values
    return lists.list.len()


def _vectors(
    column: Column, width: int
) -> Iterator[tuple[int, NDArray[np.bool_], NDArray[np.float32]]]:
    """Chunks of rows: first row, which rows have a vector bool [m], and these float32 [k, width].

    Raises:
        DataError: a vector of another length, or with a null, NaN or infinite coordinate.
    """
    lengths = _list_lengths(column)
    wrong = (lengths != width).fill_null(False)
    if wrong.any():
        raise column.refusal(
            wrong.to_numpy(),
            f"vectors of another length (such as {lengths.filter(wrong)[0]}) than {width}",
            "write all with one length, null where there is none",
        )
    for start in range(0, len(column.values), _CHUNK_ROWS):
        values = column.values.slice(start, _CHUNK_ROWS)
        present = values.is_not_null()
        if not present.any():
            continue
        flat = values.filter(present).explode().cast(pl.Float32).fill_null(np.nan).to_numpy()
        vectors = flat.reshape(-1, width)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            bad = np.zeros(len(column.values), dtype=bool)
            bad[start + np.flatnonzero(present.to_numpy())[~finite]] = True
            raise column.refusal(
                bad, "vectors with null, NaN or infinite coordinates", "mend them, or write null"
            )
        yield start, present.to_numpy(), vectors
