"""Content similarity: items like those the user had, by their features alone.

The baseline of cold items: it needs no interaction with the item it recommends.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from recclr.baselines.matrices import interactions, row_numbers
from recclr.baselines.popularity import ScoreRanker, recency
from recclr.data.log import CategoricalColumn, DenseColumn, FeatureColumn, Prepared, RaggedColumn


def content(prepared: Prepared, *, half_life_d: float | None = None) -> ScoreRanker:
    """Cosine between an item and the mean of the user's items.

    Categories, lists and text count by inverse document frequency, ln((1 + V) / (1 + items with
    it)); a number z is the direction (1, z). Each feature has length 1, or 0 where the item lacks
    it, so that all of them weigh alike.

    Args:
        half_life_d: recency of the history in days; None weighs it alike.
    """
    log = prepared.train
    items = item_vectors(prepared)
    weights = None
    if half_life_d is not None and log.timestamp is not None and prepared.cutoff is not None:
        weights = recency(log.timestamp, prepared.cutoff, half_life_d)
    profiles = _unit_rows(interactions(log, weights) @ items)
    transposed = items.T.tocsr()

    def score(user_idx: Tensor) -> Tensor:
        return torch.from_numpy((profiles[user_idx.numpy()] @ transposed).toarray())

    return ScoreRanker("content", log.num_items, score)


def item_vectors(prepared: Prepared) -> sp.csr_matrix:
    """Unit rows, float32 [V, width]; an item without any feature is a zero row."""
    blocks = [_unit_rows(_block(column)) for column in prepared.items.columns.values()]
    return _unit_rows(sp.hstack(blocks, format="csr"))


def _block(column: FeatureColumn) -> sp.csr_matrix:
    if isinstance(column, DenseColumn):
        return sp.csr_matrix(_present_values(column).numpy())
    if isinstance(column, CategoricalColumn):
        idx = column.idx.numpy()
        rows = np.flatnonzero(idx > 0)
        values, num_rows = idx[rows], len(idx)
    else:
        assert isinstance(column, RaggedColumn)
        rows, values = column.csr.row_numbers().numpy(), column.csr.values.numpy()
        num_rows = column.csr.num_rows
    ones = np.ones(len(rows), np.float32)
    block = sp.csr_matrix((ones, (rows, values)), shape=(num_rows, column.cardinality))
    frequency = np.asarray((block > 0).sum(0)).ravel()
    return block @ sp.diags(np.log((1 + num_rows) / (1 + frequency)).astype(np.float32))


def _present_values(column: DenseColumn) -> Tensor:
    """float32 [V, width]: the vectors without their last coordinate, the flag of a missing value.

    Items are not alike for lacking the same feature.
    """
    values, missing = column.values[:, :-1].float(), column.values[:, -1:].float()
    # A lone number has no direction, and divided by its length only a sign.
    return torch.cat([1 - missing, values], 1) if values.shape[1] == 1 else values


def _unit_rows(matrix: Any) -> sp.csr_matrix:
    matrix = sp.csr_matrix(matrix, dtype=np.float32)
    squares = np.bincount(row_numbers(matrix), matrix.data**2, minlength=matrix.shape[0])
    return sp.diags((1 / np.sqrt(np.maximum(squares, 1e-24))).astype(np.float32)) @ matrix
