"""The log as scipy matrices, for the baselines that are linear algebra on it."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from torch import Tensor

from recclr.data.log import EncodedLog


def interactions(log: EncodedLog, values: Tensor | None = None) -> sp.csr_matrix:
    """Users × items, float32 [num_users, num_items]; repeated pairs add up.

    Args:
        values: float [n], one per row of the log; None for 1 per distinct pair.
    """
    n = len(log)
    data = np.ones(n, np.float32) if values is None else values.float().numpy()
    rows, columns = log.user_idx.numpy(), log.item_idx.numpy()
    matrix = sp.csr_matrix((data, (rows, columns)), shape=(log.num_users, log.num_items))
    matrix.sum_duplicates()
    if values is None:
        matrix.data[:] = 1.0
    return matrix


def largest_per_row(matrix: sp.csr_matrix, count: int) -> sp.csr_matrix:
    """Only the ``count`` largest entries of each row; among equal ones the first columns."""
    order = np.lexsort((matrix.indices, -matrix.data, row_numbers(matrix)))
    place = np.arange(matrix.nnz) - np.repeat(matrix.indptr[:-1], np.diff(matrix.indptr))
    kept = np.sort(order[place < count])
    rows = row_numbers(matrix)[kept]
    return sp.csr_matrix((matrix.data[kept], (rows, matrix.indices[kept])), shape=matrix.shape)


def row_numbers(matrix: sp.csr_matrix) -> NDArray[np.int64]:
    """int64 [nnz]: the row of each stored entry."""
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
