"""Raw ids: integers or byte-exact strings, kept as they came.

Integers never pass through floats (2^53 + 1 would change) and strings are never normalised:
"Café" in two Unicode forms is two ids, which is counted and said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recclr.data.schema import widened
from recclr.errors import DataError

_PLACEHOLDERS = ["", "nan", "null", "none", "na", "n/a", "<na>", "nil", "undefined"]
_INTEGER_TEXT = r"^-?[0-9]+$"


def canonical_ids(series: pl.Series, *, where: str, as_text: bool = False) -> pl.Series:
    """The same ids as an integer or String series; nulls stay null.

    Args:
        series: a column as read.
        where: table and column, for messages, such as ``events.parquet: column 'user_id'``.
        as_text: turn integers into their decimal text (``id_type = "string"``).

    Raises:
        DataError: floats, or a type that is neither integer nor string.
    """
    dtype = series.dtype
    if dtype.is_float():
        raise DataError(
            f"{where} holds ids as floats ({dtype}), which change above 2^53; expected integers or "
            "strings; write the column as one of them (pandas makes floats of integers beside "
            "missing values: use its dtype 'Int64'); of a CSV, data.id_type = 'string' takes the "
            "text as it stands"
        )
    if isinstance(dtype, pl.Decimal) and dtype.scale == 0:
        series = series.cast(pl.Int128)
    if series.dtype == pl.Int128:
        series = _narrowed(series, where)
    if series.dtype.is_integer():
        return series.cast(pl.String) if as_text else series
    if isinstance(series.dtype, (pl.String, pl.Categorical, pl.Enum, pl.Null)):
        return series.cast(pl.String)
    raise DataError(f"{where} holds {dtype}; ids must be integers or strings")


def _narrowed(series: pl.Series, where: str) -> pl.Series:
    for dtype in (pl.Int64(), pl.UInt64()):
        cast = series.cast(dtype, strict=False)
        if cast.null_count() == series.null_count():
            return cast
    raise DataError(
        f"{where} holds integers beyond 64 bits, or negative ones beside some above 2^63; "
        "set data.id_type = 'string'"
    )


def align_ids(columns: Mapping[str, pl.Series]) -> dict[str, pl.Series]:
    """Give the id columns of several tables one type that holds all of them exactly.

    Args:
        columns: label of the table -> canonical ids.

    Raises:
        DataError: integers in one table, strings in another, or no common integer type.
    """
    labels = list(columns)
    joint = columns[labels[0]].dtype
    for label in labels[1:]:
        joint = _joint_type(labels[0], joint, label, columns[label])
    try:
        return {label: series.cast(joint) for label, series in columns.items()}
    except pl.exceptions.InvalidOperationError as error:
        raise DataError(
            f"the ids of {' and '.join(labels)} have no common integer type: negative values "
            "beside values above 2^63; set data.id_type = 'string'"
        ) from error


def _joint_type(first: str, joint: pl.DataType, label: str, other: pl.Series) -> pl.DataType:
    if joint.is_integer() != other.dtype.is_integer():
        raise DataError(
            f"ids are {joint} in {first} but {other.dtype} in {label}; write both with one type, "
            "or set data.id_type = 'string' to compare them as text"
        )
    wide = widened(joint, other.dtype)
    if wide is not None:
        return wide
    # UInt64 beside a signed type: whichever holds the values that are there.
    fits = other.cast(pl.Int64, strict=False).null_count() == other.null_count()
    return pl.Int64() if joint != pl.UInt64 and fits else pl.UInt64()


def lookalikes(ids: pl.Series) -> int:
    """How many distinct ids equal another one but for Unicode form, outer spaces or case.

    Zero for integers. Only counted: merging them is the caller's decision.
    """
    if ids.dtype != pl.String:
        return 0
    distinct = ids.drop_nulls().unique()
    plain = distinct.str.normalize("NFC").str.strip_chars().str.to_lowercase()
    return len(distinct) - plain.n_unique()


def stray_text(ids: pl.Series) -> int:
    """Distinct ids that are no integers in a column where at least nine of ten are, else 0.

    Such as ``NULL`` or ``12.0`` among numbers in a CSV, which makes the whole column text.
    """
    if ids.dtype != pl.String or not len(ids):
        return 0
    distinct = ids.drop_nulls().unique()
    strays = len(distinct) - int(distinct.str.contains(_INTEGER_TEXT).sum())
    return strays if strays * 10 <= len(distinct) else 0


def placeholders(ids: pl.Series) -> dict[str, int]:
    """Rows by id, of ids that look like a missing one that was written as text, most first.

    Args:
        ids: of rows, with repeats. Of integers none is.
    """
    if ids.dtype != pl.String:
        return {}
    distinct = ids.unique()
    plain = distinct.str.strip_chars().str.to_lowercase()
    found = distinct.filter(plain.is_in(_PLACEHOLDERS))
    if not len(found):
        return {}
    return dict(ids.filter(ids.is_in(found.implode())).value_counts(sort=True).iter_rows())


def hash_ids(ids: pl.Series, seed: int) -> NDArray[np.uint64]:
    """A 64-bit hash per row [n] that depends on the id and the seed alone.

    The same on every machine and in every version (splitmix64 for integers, BLAKE2b for strings),
    so that a split neither depends on the order of rows nor moves when rows are added. Ids must
    not be null.
    """
    if ids.dtype == pl.String:
        distinct = ids.unique()
        digests = b"".join(
            hashlib.blake2b(value.encode(), digest_size=8).digest() for value in distinct
        )
        table = pl.DataFrame({"id": distinct, "hash": np.frombuffer(digests, dtype="<u8")})
        codes = pl.DataFrame({"id": ids}).join(table, on="id", how="left", maintain_order="left")
        bits = codes["hash"].to_numpy()
    else:
        wide = ids if ids.dtype == pl.UInt64 else ids.cast(pl.Int64)
        bits = wide.to_numpy().astype(np.uint64, copy=False)
    return mix(bits ^ mix(np.array([seed], dtype=np.uint64)))


def mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of uint64, any shape."""
    mixed = bits + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Float64 in [0, 1) from the upper 53 of 64 bits, any shape."""
    drawn: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return drawn
