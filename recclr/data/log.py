"""The tensors that everything above ``data`` works on. Torch only, no data frames.

Raw ids do not appear here: a user is a row number below ``num_users``, an item one below
``num_items``. Row numbers of users at or above ``num_users`` are users the log does not know.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from recclr.errors import ShapeError


@dataclass(frozen=True)
class Csr:
    """Ragged rows of indices without padding.

    Attributes:
        offsets: int64 [num_rows + 1], starting at 0 and never falling.
        values: int32 [nnz]; row ``r`` owns ``values[offsets[r]:offsets[r + 1]]``. May be empty.
    """

    offsets: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if self.offsets.dtype != torch.int64 or self.offsets.ndim != 1 or not len(self.offsets):
            raise ShapeError("Csr offsets must be int64 of shape [num_rows + 1]")

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> Tensor:
        """int64 [num_rows]."""
        return self.offsets.diff()

    def row(self, index: int) -> Tensor:
        """The values of one row, int32, a view."""
        return self.values[int(self.offsets[index]) : int(self.offsets[index + 1])]

    def take(self, rows: Tensor) -> Csr:
        """The given rows (integer [M], each in range), in the given order; repeats allowed."""
        rows = rows.long()
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        total = int(offsets[-1])
        positions = torch.arange(total, device=rows.device)
        positions += (starts - offsets[:-1]).repeat_interleave(lengths, output_size=total)
        return Csr(offsets, self.values[positions])

    def row_numbers(self) -> Tensor:
        """int64 [nnz]: the row that each value belongs to."""
        rows = torch.arange(self.num_rows, device=self.offsets.device)
        return rows.repeat_interleave(self.lengths(), output_size=len(self.values))

    def to(self, device: torch.device | str) -> Csr:
        return Csr(self.offsets.to(device), self.values.to(device))

    @classmethod
    def from_pairs(cls, rows: Tensor, values: Tensor, num_rows: int) -> Csr:
        """Group ``values`` [nnz] by ``rows`` [nnz]; within a row the given order is kept."""
        rows = rows.long()
        order = torch.argsort(rows, stable=True)
        offsets = torch.zeros(num_rows + 1, dtype=torch.int64, device=rows.device)
        if len(rows):
            torch.cumsum(torch.bincount(rows, minlength=num_rows), 0, out=offsets[1:])
        return cls(offsets, values[order].to(torch.int32))


@dataclass(frozen=True)
class CategoricalColumn:
    """One category per row: int32 [num_rows] below ``cardinality``; 0 is missing or unknown."""

    idx: Tensor
    cardinality: int


@dataclass(frozen=True)
class RaggedColumn:
    """Any number of categories per row (multi-hot lists, hashed text); an empty row is missing."""

    csr: Csr
    cardinality: int


@dataclass(frozen=True)
class DenseColumn:
    """A fixed vector per row: float32 or float16 [num_rows, width], finite."""

    values: Tensor


FeatureColumn = CategoricalColumn | RaggedColumn | DenseColumn


@dataclass(frozen=True)
class FeatureTable:
    """Encoded features of all users or of all items; row = dense index."""

    num_rows: int
    columns: dict[str, FeatureColumn] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedLog:
    """Positive interactions as columns, sorted by (time, row) where there is a time.

    Attributes:
        user_idx: int32 [n]. item_idx: int32 [n]; -1 only in held-out logs, for an item that is in
            neither train nor catalogue and so can never be ranked.
        timestamp: int64 seconds UTC [n], or None.
        weight: float32 [n], positive, or None for all ones.
    """

    user_idx: Tensor
    item_idx: Tensor
    num_users: int
    num_items: int
    timestamp: Tensor | None = None
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.user_idx)

    def item_counts(self) -> Tensor:
        """int64 [num_items]: interactions per item."""
        return torch.bincount(self.item_idx[self.item_idx >= 0], minlength=self.num_items)

    def user_counts(self) -> Tensor:
        """int64 [at least num_users]: interactions per user."""
        return torch.bincount(self.user_idx, minlength=self.num_users)

    def user_items(self, num_rows: int | None = None) -> Csr:
        """Items of each user in log order (oldest first), [num_rows or num_users] rows."""
        return Csr.from_pairs(self.user_idx, self.item_idx, num_rows or self.num_users)

    def to(self, device: torch.device | str) -> EncodedLog:
        moved = {
            name: value.to(device)
            for name in ("user_idx", "item_idx", "timestamp", "weight")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Prepared:
    """All that training and evaluation see of the data.

    Attributes:
        train: the rows that everything is fitted on (train, or train + validation at a refit).
        held_out: the rows that are judged (validation, or test); None where there are none. Its
            ``user_idx`` may reach beyond ``train.num_users`` (users without id or feature).
        users, items: features, fitted on ``train`` only.
        cutoff: int seconds UTC at which histories and statistics are frozen for evaluation and
            export: just after the last train event. None without timestamps.
    """

    train: EncodedLog
    users: FeatureTable
    items: FeatureTable
    held_out: EncodedLog | None = None
    cutoff: int | None = None
