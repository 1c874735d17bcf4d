"""Embeddings as Arrow tables and back, bit for bit."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from recclr.errors import StoreError


def to_table(
    ids: pl.Series, vectors: Tensor, *, id_column: str, vector_column: str, note: dict[str, str]
) -> pa.Table:
    """Two columns without nulls; the vectors are not copied.

    Args:
        ids: [n]. vectors: float32 [n, D] on the CPU. note: goes into the schema's metadata.
    """
    dim = vectors.shape[1]
    # Newer levels hand out string views, which other readers may not know.
    raw_ids = ids.to_arrow(compat_level=pl.CompatLevel.oldest())
    element = pa.field("element", pa.float32(), nullable=False)
    schema = pa.schema(
        [
            pa.field(id_column, raw_ids.type, nullable=False),
            pa.field(vector_column, pa.list_(element, dim), nullable=False),
        ],
        metadata=note,
    )
    flat = pa.array(vectors.contiguous().numpy().reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, type=schema.field(vector_column).type)
    return pa.Table.from_arrays([raw_ids, lists], schema=schema)


def ids_of(table: pa.Table, column: str, dtype: pl.DataType, where: str) -> pl.Series:
    """The raw ids of a table that was read back.

    Raises:
        StoreError: no such column, another type, or nulls.
    """
    ids = pl.Series(column, _column(table, column, where))
    if ids.dtype != dtype:
        raise StoreError(f"{where}: column {column!r}: expected {dtype}, found {ids.dtype}")
    return ids


def vectors_of(table: pa.Table, column: str, dim: int, where: str) -> Tensor:
    """The vectors of a table that was read back, float32 [n, D], in memory of their own.

    Raises:
        StoreError: no such column, another type or dimension, or nulls.
    """
    lists = _column(table, column, where)
    kind = lists.type
    if (
        not pa.types.is_fixed_size_list(kind)
        or kind.list_size != dim
        or not pa.types.is_float32(kind.value_type)
    ):
        raise StoreError(f"{where}: column {column!r}: expected {dim} float32, found {kind}")
    flat = lists.combine_chunks().flatten()
    if flat.null_count:
        raise StoreError(f"{where}: column {column!r} holds {flat.null_count:,} nulls in vectors")
    values = np.array(flat.to_numpy(zero_copy_only=False), dtype=np.float32)
    return torch.from_numpy(values.reshape(len(table), dim))


def _column(table: pa.Table, column: str, where: str) -> pa.ChunkedArray:
    if column not in table.column_names:
        raise StoreError(f"{where}: expected a column {column!r}, found {table.column_names}")
    values = table[column]
    if values.null_count:
        raise StoreError(f"{where}: column {column!r} holds {values.null_count:,} nulls")
    return values
