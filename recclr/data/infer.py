"""Which features the columns of a user or item table make, where nobody has said."""

from __future__ import annotations

from typing import Any

import polars as pl

_MAX_CATEGORIES = 10_000
_BUCKETS = 20_000
# Dropped now and then, so that a tower learns to do without any one of them.
_DROPOUT = 0.1


def infer_features(table: pl.DataFrame, *, key: str) -> dict[str, dict[str, Any]]:
    """Feature settings by column, as the configuration writes them.

    Lists of strings or integers become multi-hot, numbers numeric, strings categories where they
    repeat and hashed text where they do not; fixed-size lists of floats are vectors. Columns of
    one value only, dates and nested types are left out.

    Args:
        key: the id column, which is no feature.
    """
    features = {}
    for name in table.columns:
        found = None if name == key else _infer(table[name])
        if found is not None:
            features[name] = found | {"dropout": _DROPOUT}
    return features


def _infer(column: pl.Series) -> dict[str, Any] | None:
    dtype = column.dtype
    distinct = column.drop_nulls().n_unique() if not dtype.is_nested() else 2
    if distinct < 2:
        return None
    if isinstance(dtype, pl.Array) and dtype.inner.is_float():
        return {"kind": "vector"}
    if isinstance(dtype, (pl.List, pl.Array)):
        inner: Any = dtype.inner
        return {"kind": "multi_hot"} if inner == pl.String or inner.is_integer() else None
    if dtype == pl.Boolean:
        return {"kind": "categorical"}
    if dtype.is_numeric():
        return {"kind": "numeric"}
    if dtype in (pl.String, pl.Categorical, pl.Enum):
        repeats = distinct <= _MAX_CATEGORIES and distinct * 2 <= len(column)
        return {"kind": "categorical"} if repeats else {"kind": "text", "buckets": _BUCKETS}
    return None
