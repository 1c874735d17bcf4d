"""The least time that a step or a ranking can take, from arithmetic and traffic alone.

Shape letters: B positives of a step, C candidates, Q queries, V items, D dimension. Everything is
float32; a rate is measured on the machine in the same run. One multiply-add is two operations.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes that the update of one touched row reads and writes, as (per dimension, per row).
UPDATE_BYTES = {
    "adam": (24, 0),
    "rowwise_adam": (16, 8),
    "rowwise_adagrad": (8, 8),
    "sgd": (8, 0),
}
# A distinct row is read at least once; a vector of the batch is written, and its gradient read.
_READ_BYTES, _VECTOR_BYTES = 4, 8


@dataclass(frozen=True)
class Rates:
    """The machine at its best: ``gemm`` in operations/s, ``copy`` in bytes/s, read + write."""

    gemm: float
    copy: float


@dataclass(frozen=True)
class Work:
    """What cannot be avoided.

    Attributes:
        flop: operations of the matrix products.
        row_bytes: traffic of table rows, forward, backward and update.
    """

    flop: float
    row_bytes: float = 0.0

    def gemm_s(self, rates: Rates) -> float:
        return self.flop / rates.gemm

    def rows_s(self, rates: Rates) -> float:
        return self.row_bytes / rates.copy

    def floor_s(self, rates: Rates) -> float:
        """The longer of the two: arithmetic and memory may overlap, so their sum proves nothing."""
        return max(self.gemm_s(rates), self.rows_s(rates))

    def bound(self, rates: Rates) -> str:
        """``gemm`` or ``rows``: which of the two it is."""
        return "gemm" if self.gemm_s(rates) >= self.rows_s(rates) else "rows"


def training_work(
    *,
    batch_size: int,
    num_candidates: int,
    dim: int,
    num_vectors: int = 0,
    num_touched: int = 0,
    optimizer: str = "adam",
) -> Work:
    """One step: 6·B·C·D operations (scores, and a product for each side's gradient) and its rows.

    Args:
        num_candidates: scored by every row; an item that was drawn twice is scored once.
        num_vectors: that tables give to the model, repeats counted; a bag is one.
        num_touched: distinct rows read and updated.
        optimizer: of the tables.
    """
    row_bytes = table_bytes(
        dim=dim, num_vectors=num_vectors, num_touched=num_touched, optimizer=optimizer
    )
    return Work(6.0 * batch_size * num_candidates * dim, row_bytes)


def table_bytes(*, dim: int, num_vectors: int, num_touched: int, optimizer: str) -> float:
    """Traffic of lookups, their gradients and the update; for the arguments see above."""
    per_dim, per_row = UPDATE_BYTES[optimizer]
    row_bytes = num_touched * ((_READ_BYTES + per_dim) * dim + per_row)
    return float(row_bytes + num_vectors * _VECTOR_BYTES * dim)


def ranking_work(*, num_queries: int, num_items: int, dim: int) -> Work:
    """Every query against every item: 2·Q·V·D operations."""
    return Work(2.0 * num_queries * num_items * dim)
