"""Between tensors and Arrow's fixed-size lists, without a copy per row."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from recclr.errors import StoreError


def to_arrow(ids: pl.Series, vectors: Tensor) -> pa.Table:
    """``id`` as it came, ``idx`` int32, ``vector`` as fixed-size list of float32."""
    values = pa.array(np.ascontiguousarray(vectors.numpy()).reshape(-1))
    columns: dict[str, Any] = {
        "id": _plain_strings(ids.to_arrow()),
        "idx": pa.array(np.arange(len(ids), dtype=np.int32)),
        "vector": pa.FixedSizeListArray.from_arrays(values, vectors.shape[1]),
    }
    return pa.table(columns)


def from_arrow(table: pa.Table, dim: int) -> tuple[pl.Series, Tensor]:
    """Ids and float32 [M, D], in order of ``idx``.

    Raises:
        StoreError: columns are missing, or vectors are null or of another dimension.
    """
    missing = {"id", "idx", "vector"} - set(table.column_names)
    if missing:
        raise StoreError(f"the table lacks the columns {sorted(missing)}")
    table = table.select(["id", "idx", "vector"]).sort_by("idx")
    column = table["vector"].combine_chunks()
    values = column.values if isinstance(column, pa.FixedSizeListArray) else column
    if column.null_count or len(values) != dim * table.num_rows:
        raise StoreError(f"expected {table.num_rows} vectors of {dim} numbers each")
    flat = np.array(values.to_numpy(zero_copy_only=False), dtype=np.float32)
    ids = pl.Series("id", table["id"])
    return ids, torch.from_numpy(flat.reshape(table.num_rows, dim))


def _plain_strings(ids: Any) -> Any:
    # polars writes string views or 64-bit strings, which not every reader of Parquet knows.
    if pa.types.is_integer(ids.type):
        return ids
    return ids.cast(pa.string())
