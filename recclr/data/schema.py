"""Joining the column types of several files without changing a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from recclr.errors import DataError

_SIGNED = (pl.Int8, pl.Int16, pl.Int32, pl.Int64)
_UNSIGNED = (pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64)


def joint_schema(
    labels: list[str], schemas: Sequence[pl.Schema], name: str
) -> dict[str, pl.DataType]:
    """Column -> the type that holds its values of every file.

    Raises:
        DataError: two files hold a column in types that only a lossy cast would join.
    """
    joint: dict[str, tuple[pl.DataType, str]] = {}
    for label, schema in zip(labels, schemas, strict=True):
        for column, dtype in schema.items():
            before, first = joint.get(column, (dtype, label))
            wide = widened(before, dtype)
            if wide is None:
                raise DataError(
                    f"{name}: column {column!r} is {before} in {first} and {dtype} in {label}, "
                    "which cannot be joined without changing values; write both with one type"
                )
            joint[column] = (wide, first)
    return {column: dtype for column, (dtype, _) in joint.items()}


def widened(a: pl.DataType, b: pl.DataType) -> pl.DataType | None:
    """The smallest type that holds every value of both exactly, or None."""
    if a == b or b == pl.Null:
        return a
    if a == pl.Null:
        return b
    if isinstance(a, pl.List) and isinstance(b, pl.List):
        inner = widened(_instance(a.inner), _instance(b.inner))
        return None if inner is None else pl.List(inner)
    if a.is_float() and b.is_float():
        return pl.Float64()
    if a.is_integer() and b.is_float():
        return _integer_in_float(a, b)
    if a.is_float() and b.is_integer():
        return _integer_in_float(b, a)
    if a.is_integer() and b.is_integer():
        return _widened_integer(a, b)
    texts = (pl.String, pl.Categorical, pl.Enum)
    return pl.String() if isinstance(a, texts) and isinstance(b, texts) else None


def _instance(dtype: Any) -> pl.DataType:
    instance: pl.DataType = dtype() if isinstance(dtype, type) else dtype
    return instance


def _integer_in_float(integer: pl.DataType, real: pl.DataType) -> pl.DataType | None:
    if integer in (pl.Int8, pl.Int16, pl.UInt8, pl.UInt16):
        return real
    return pl.Float64() if integer in (pl.Int32, pl.UInt32) else None


def _widened_integer(a: pl.DataType, b: pl.DataType) -> pl.DataType | None:
    if pl.Int128 in (a, b):  # how polars reads JSON integers above 2^63
        return pl.Int128()
    for family in (_SIGNED, _UNSIGNED):
        if a in family and b in family:
            return family[max(family.index(type(a)), family.index(type(b)))]()
    signed, unsigned = (a, b) if a in _SIGNED else (b, a)
    if signed not in _SIGNED or unsigned not in _UNSIGNED or unsigned == pl.UInt64:
        return None
    return _SIGNED[max(_SIGNED.index(type(signed)), _UNSIGNED.index(type(unsigned)) + 1)]()
