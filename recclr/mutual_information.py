"""How much the feature columns of a table tell about each other.

Every column becomes one category per row, of a few hundred at most; the mutual information of two
of them is that of their counts in the table. Such an estimate is too high by about
(categories - 1)² / 2n (Miller 1955), most of all for columns of many categories in a short table.

Shape letters: n rows of the table, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recclr.data.log import CategoricalColumn, FeatureColumn, RaggedColumn
from recclr.order import generator, scrambled

_MAX_ROWS = 1 << 18
_BUCKETS, _BINS, _SIGNS = 256, 16, 8


def mutual_information(columns: Sequence[FeatureColumn | None]) -> Tensor:
    """Mutual information of each pair of columns, in nats.

    Args:
        columns: of one table; of more than 262,144 rows as many are taken, evenly spaced. None for
            what is no column, and tells nothing.

    Returns:
        float64 [K, K], symmetric, none negative; on the diagonal the entropy of each.
    """
    found = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    coded = {place: column_codes(column) for place, column in enumerate(columns) if column}
    for one, codes in coded.items():
        for other, others in coded.items():
            if one <= other:
                found[one, other] = found[other, one] = information(codes, others)
    return found


def information(one: Tensor, other: Tensor) -> float:
    """Mutual information of two columns of category numbers, int64 [n], none negative; in nats.

    0 for an empty table. Rounding never makes it negative.
    """
    if not len(one):
        return 0.0
    width = int(other.max()) + 1
    joint = torch.bincount(one * width + other, minlength=(int(one.max()) + 1) * width)
    shares = joint.view(-1, width).double() / len(one)
    expected = shares.sum(1, keepdim=True) * shares.sum(0)
    some = shares > 0
    return max(0.0, float((shares[some] * (shares[some] / expected[some]).log()).sum()))


def column_codes(column: FeatureColumn) -> Tensor:
    """A category number below 257 for each row, int64 [n], 0 where it is missing.

    Categories beyond 256, and whole lists, are hashed; numbers go to 16 bins of equal counts; of a
    vector the signs of 8 random projections count (Charikar 2002).
    """
    if isinstance(column, CategoricalColumn):
        idx = column.idx[_rows_of(len(column.idx))].long()
        return idx if column.cardinality <= _BUCKETS else _hashed(idx, idx == 0)
    if isinstance(column, RaggedColumn):
        bags = column.csr.take(_rows_of(column.csr.num_rows))
        # A sum, so that the order of a list does not count.
        sums = torch.zeros(bags.num_rows, dtype=torch.int64)
        sums.index_add_(0, bags.row_numbers(), scrambled(bags.values.long() + 1))
        return _hashed(sums, bags.lengths() == 0)
    values = column.values[_rows_of(len(column.values))].double()
    if values.shape[1] == 1:
        return _binned(values[:, 0])
    # The last coordinate is the flag of a missing value, whose others are 0.
    missing = (values[:, -1] == 1) & (values[:, :-1] == 0).all(1)
    if values.shape[1] == 2:
        codes = torch.zeros(len(values), dtype=torch.int64)
        codes[~missing] = _binned(values[~missing, 0]) + 1
        return codes
    draws = torch.randn(
        values.shape[1], _SIGNS, generator=generator("cpu", _SIGNS), dtype=torch.float64
    )
    present = values[~missing]
    signs = (values - present.mean(0)) @ draws > 0
    codes = 1 + (signs * 2 ** torch.arange(_SIGNS)).sum(1)
    return codes.masked_fill(missing, 0)


def _rows_of(count: int) -> Tensor:
    """At most so many rows, evenly spaced."""
    rows = torch.arange(min(count, _MAX_ROWS))
    return rows if count <= _MAX_ROWS else rows * count // _MAX_ROWS


def _hashed(values: Tensor, missing: Tensor) -> Tensor:
    return (1 + scrambled(values) % (_BUCKETS - 1)).masked_fill(missing, 0)


def _binned(values: Tensor) -> Tensor:
    """Bins of equal counts, int64 [n] below 16; equal values share one."""
    if not len(values):
        return torch.zeros(0, dtype=torch.int64)
    steps = torch.arange(1, _BINS) * len(values) // _BINS
    return torch.searchsorted(values.sort().values[steps], values.contiguous(), right=True)
