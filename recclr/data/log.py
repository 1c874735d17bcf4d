"""The tensors that everything above ``data`` works on. Torch only, no data frames.

Raw ids do not appear here: a user is a row number below ``num_users``, an item one below
``num_items``. Row numbers of users at or above ``num_users`` are users the log does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from recclr.errors import ShapeError

COLUMNS = ("user_idx", "item_idx", "timestamp", "weight")
# Rows that are looked at together: what is made of them is many times as large.
_STRETCH = 1 << 22


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
        return cls.from_rising(rows, values[torch.argsort(rows, stable=True)], num_rows)

    @classmethod
    def from_rising(cls, rows: Tensor, values: Tensor, num_rows: int) -> Csr:
        """As ``from_pairs``, of ``values`` that stand by rising row already.

        Args:
            rows: only how often each comes counts, so they may be in any order.
        """
        offsets = torch.zeros(num_rows + 1, dtype=torch.int64, device=rows.device)
        if len(rows):
            torch.cumsum(torch.bincount(rows, minlength=num_rows), 0, out=offsets[1:])
        return cls(offsets, values.to(torch.int32))


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
class Groups:
    """A log's rows by entity, made once and beforehand (``grouping``); None where not made.

    Attributes:
        user_items: items of each user in log order.
        known_items, known_users: items of each user and users of each item, every pair once,
            rising in each row.
        user_times, item_times: int64 [n], the sorted keys of ``statistics.TimeIndex``.
    """

    user_items: Csr | None = None
    known_items: Csr | None = None
    known_users: Csr | None = None
    user_times: Tensor | None = None
    item_times: Tensor | None = None


@dataclass(frozen=True)
class EncodedLog:
    """Positive interactions as columns, sorted by (time, row) where there is a time.

    Attributes:
        user_idx: int32 [n]. item_idx: int32 [n]; -1 only in held-out logs, for an item that is in
            neither train nor catalogue and so can never be ranked.
        timestamp: int64 seconds UTC [n], or None.
        weight: float32 [n], positive, or None for all ones.
        mapped_for: of a log whose columns lie in memory-mapped files (``shards``, or those of
            ``prepare`` for a log that lies on the disk), the device that its batches go to; None
            for one in memory.
        groups: what such a log has beside its columns.
    """

    user_idx: Tensor
    item_idx: Tensor
    num_users: int
    num_items: int
    timestamp: Tensor | None = None
    weight: Tensor | None = None
    mapped_for: torch.device | None = None
    groups: Groups = field(default_factory=Groups)

    def __len__(self) -> int:
        return len(self.user_idx)

    @property
    def device(self) -> torch.device:
        """Where batches are made or go to."""
        return self.item_idx.device if self.mapped_for is None else self.mapped_for

    def item_counts(self) -> Tensor:
        """int64 [num_items]: interactions per item."""
        counts = torch.zeros(self.num_items, dtype=torch.int64, device=self.item_idx.device)
        for part in torch.split(self.item_idx, _STRETCH):
            counts += torch.bincount(part[part >= 0], minlength=self.num_items)
        return counts.to(self.device)

    def user_counts(self) -> Tensor:
        """int64 [at least num_users]: interactions per user."""
        most = int(self.user_idx.max()) + 1 if len(self) else 0
        size = max(self.num_users, most)
        counts = torch.zeros(size, dtype=torch.int64, device=self.user_idx.device)
        for part in torch.split(self.user_idx, _STRETCH):
            counts += torch.bincount(part, minlength=size)
        return counts.to(self.device)

    def user_items(self, num_rows: int | None = None) -> Csr:
        """Items of each user in log order (oldest first), [num_rows or num_users] rows."""
        made, size = self.groups.user_items, num_rows or self.num_users
        if made is None:
            return Csr.from_pairs(self.user_idx, self.item_idx, size)
        # Users beyond those of the log have nothing.
        more = made.offsets[-1:].expand(size - made.num_rows)
        return Csr(torch.cat([made.offsets, more]), made.values).to(self.device)

    def known_pairs(self) -> tuple[Csr, Csr]:
        """Items of each user and users of each item: every pair once, rising in each row."""
        items, users = self.groups.known_items, self.groups.known_users
        if items is not None and users is not None:
            return items.to(self.device), users.to(self.device)
        pairs = torch.unique(self.user_idx.long() * self.num_items + self.item_idx)
        of_user, of_item = pairs // self.num_items, pairs % self.num_items
        items = Csr.from_rising(of_user, of_item, self.num_users)
        # One sort of keys is faster than one of places, and what they take.
        turned = (of_item * self.num_users + of_user).sort().values
        users = Csr.from_rising(of_item, turned % self.num_users, self.num_items)
        return items.to(self.device), users.to(self.device)

    def stretches(self, length: int | None = None) -> Iterator[EncodedLog]:
        """The log in pieces of at most ``length`` rows, in order; views, without groups.

        Args:
            length: 4 M rows if not given.
        """
        length = length or _STRETCH
        for start in range(0, len(self), length):
            yield self.rows(slice(start, start + length))

    def rows(self, which: Tensor | slice) -> EncodedLog:
        """Some rows (integer [M], or a slice) as a log of their own where the columns are."""
        if isinstance(which, slice):
            return self.with_columns(lambda column: column[which])
        return self.with_columns(lambda column: column.index_select(0, which))

    def columns(self) -> Iterator[tuple[str, Tensor]]:
        """Every column that there is, by name."""
        for name in COLUMNS:
            column = getattr(self, name)
            if column is not None:
                yield name, column

    def with_columns(self, change: Callable[[Tensor], Tensor]) -> EncodedLog:
        """A log of the same users and items whose columns are what ``change`` makes of these."""
        changed: dict[str, Any] = {name: change(column) for name, column in self.columns()}
        return EncodedLog(num_users=self.num_users, num_items=self.num_items, **changed)

    def to(self, device: torch.device | str) -> EncodedLog:
        """On a device; the columns of a mapped log stay where they are, its batches go there."""
        if self.mapped_for is not None:
            return replace(self, mapped_for=torch.device(device))
        moved = self.with_columns(lambda column: column.to(device))
        return replace(moved, groups=self.groups)


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
        explicit: items that are negatives of their user (``explicit``), one row per user; None
            where none were read.
        teacher: users float32 [num_users + 1, T] and items [num_items, T] of another model, whose
            dot products are to be learned from; None where there is none. Never stored.
    """

    train: EncodedLog
    users: FeatureTable
    items: FeatureTable
    held_out: EncodedLog | None = None
    cutoff: int | None = None
    explicit: Csr | None = None
    teacher: tuple[Tensor, Tensor] | None = None
