"""What a tower adds up: one part per id or feature, each giving [M, D]; see also ``history``.

Shape letters: M rows asked for, D embedding dimension, W width of a dense feature.

A part gets ``Rows``: the entities and the moment they are seen at. Row ``num_rows`` of every table
is the entity nothing is known of; each part has a learned vector for it, and dropout trains that
vector by showing it in place of known ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recclr.data.log import CategoricalColumn, Csr, RaggedColumn
from recclr.optim import Table
from recclr.order import keyed_uniform
from recclr.ragged import grid, longest
from recclr.rows import Rows
from recclr.statistics import TimeIndex, statistics_at, statistics_width

_HIDDEN = 32


class IdPart(nn.Module):
    """The id embedding. Table row 0 is the unknown id, row i + 1 entity i.

    Where training never shows the unknown id in place of a positive's own, an unknown entity gets
    the mean of the known ones. It may be shown elsewhere even so: as a negative, for an item of the
    catalogue that nobody has, or in a view. But what the loss only pushes away is below every known
    item, and says nothing of an unknown one.

    Args:
        known: bool [num_rows]: entities with a train interaction.
        trains_unknown: whether training shows the unknown id in place of known ones.
        first_seen: int64 [num_rows] seconds: with it, an id counts only after that moment.
    """

    known: Tensor
    first_seen: Tensor | None

    def __init__(
        self,
        table: Table,
        known: Tensor,
        *,
        dropout: float,
        trains_unknown: bool,
        first_seen: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.table = table
        self.dropout = dropout
        self.draws = dropout > 0.0
        beyond = torch.zeros(1, dtype=torch.bool)
        self.register_buffer("known", torch.cat([known, beyond]), persistent=False)
        self.register_buffer("first_seen", first_seen, persistent=False)
        # Without any unknown row to serve the lookup is the bare table (the fast path).
        self.always = bool(known.all()) and dropout == 0.0 and first_seen is None
        self.trains_unknown = trains_unknown

    def forward(self, rows: Rows) -> Tensor:
        num_rows = len(self.known) - 1
        if self.always and rows.generator is not None and rows.shows_all:
            return _vectors(self.table, rows.idx + 1)
        idx = rows.idx.clamp(max=num_rows)
        known = self.known[idx]
        if self.first_seen is not None and rows.at is not None:
            known = known & (self.first_seen[idx.clamp(max=num_rows - 1)] < rows.at)
        hidden = rows.dropped(self.dropout)
        if hidden is not None:
            known = known & ~hidden
        vectors = _vectors(self.table, torch.where(known, idx + 1, 0))
        if self.trains_unknown or rows.generator is not None:
            return vectors
        # Row 0 is as random as on the first day; the mean is the id that popularity would have.
        mean = self.table.mean(self.known.roll(1))
        return torch.where(known[:, None], vectors, mean)


class CategoryPart(nn.Module):
    """One category per entity; table row 0 is missing or unknown."""

    idx: Tensor

    def __init__(
        self, table: Table, column: CategoricalColumn, *, dropout: float, swap: float = 0.0
    ) -> None:
        super().__init__()
        self.table = table
        self.dropout, self.swap = dropout, swap
        self.draws = dropout > 0.0 or swap > 0.0
        idx = torch.cat([column.idx.long(), torch.zeros(1, dtype=torch.int64)])
        self.register_buffer("idx", idx, persistent=False)

    def forward(self, rows: Rows) -> Tensor:
        rows = rows.swapped(self.swap)
        idx = self.idx[rows.idx.clamp(max=len(self.idx) - 1)]
        hidden = rows.dropped(self.dropout)
        return _vectors(self.table, idx if hidden is None else idx.masked_fill(hidden, 0))


class BagPart(nn.Module):
    """Mean over any number of categories; the last table row stands for none.

    Args:
        subsample: probability that training keeps a category; the one that drew best always stays.
    """

    offsets: Tensor
    values: Tensor

    def __init__(
        self,
        table: Table,
        column: RaggedColumn,
        *,
        dropout: float,
        swap: float = 0.0,
        subsample: float = 1.0,
    ) -> None:
        super().__init__()
        self.table = table
        self.dropout, self.swap, self.subsample = dropout, swap, subsample
        self.draws = dropout > 0.0 or swap > 0.0 or subsample < 1.0
        offsets = torch.cat([column.csr.offsets, column.csr.offsets[-1:]])
        self.longest = longest(offsets)
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("values", column.csr.values, persistent=False)

    def forward(self, rows: Rows) -> Tensor:
        rows = rows.swapped(self.swap)
        pooled, lengths = (self._padded if rows.fixed_shapes else self._ragged)(rows)
        pooled = pooled / lengths.clamp(min=1)[:, None]
        hidden = rows.dropped(self.dropout)
        absent = lengths == 0 if hidden is None else (lengths == 0) | hidden
        # Looked up once, whatever the number of empty bags.
        last = torch.full((1,), self.table.num_rows - 1, device=lengths.device)
        return torch.where(absent[:, None], _vectors(self.table, last), pooled)

    def _ragged(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Sum of the vectors of each bag, and how many there are."""
        csr = Csr(self.offsets, self.values)
        bags = csr.take(rows.idx.clamp(max=csr.num_rows - 1))
        if self._subsamples(rows):
            bags = self._subsampled(bags, rows)
        return self.table.bag(bags.values.long(), bags.offsets[:-1]), bags.lengths()

    def _subsamples(self, rows: Rows) -> bool:
        return rows.generator is not None and self.subsample < 1.0

    def _keep(self, rows: Rows) -> float:
        return 1.0 - (1.0 - self.subsample) * rows.share

    def _subsampled(self, bags: Csr, rows: Rows) -> Csr:
        owner = bags.row_numbers()
        positions = torch.arange(len(owner), device=owner.device) - bags.offsets[owner]
        drawn = keyed_uniform(rows.seeds()[owner], positions)
        least = torch.ones(bags.num_rows, device=owner.device)
        least.scatter_reduce_(0, owner, drawn, "amin")
        kept = (drawn < self._keep(rows)) | (drawn <= least[owner])
        ends = torch.zeros(len(owner) + 1, dtype=torch.int64, device=owner.device)
        torch.cumsum(kept, 0, out=ends[1:])
        return Csr(ends[bags.offsets], bags.values[kept])

    def _padded(self, rows: Rows) -> tuple[Tensor, Tensor]:
        idx = rows.idx.clamp(max=len(self.offsets) - 2)
        start, stop = self.offsets[idx], self.offsets[idx + 1]
        if not self.longest:
            return self.table.weight.new_zeros((len(idx), self.table.dim)), stop - start
        places, alive = grid(start, stop, self.longest, len(self.values))
        if self._subsamples(rows):
            positions = torch.arange(self.longest, device=idx.device)
            drawn = keyed_uniform(rows.seeds()[:, None], positions)
            drawn = torch.where(alive, drawn, 1.0)
            least = drawn.amin(1, keepdim=True)
            alive = alive & ((drawn < self._keep(rows)) | (drawn <= least))
        # Beyond its end a bag asks for the row that is looked up below in any case.
        values = torch.where(alive, self.values[places].long(), self.table.num_rows - 1)
        return self.table.padded_bag(values, alive), alive.sum(1)


class DensePart(nn.Module):
    """A fixed vector per entity through a small network, or one linear layer if it is wide.

    Args:
        values: [num_rows, W]; the last coordinate says what is missing (1) where there is jitter.
        jitter: standard deviation of the noise on the other coordinates of what is not missing.
    """

    values: Tensor

    def __init__(
        self, values: Tensor, dim: int, *, dropout: float, swap: float = 0.0, jitter: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout, self.swap, self.jitter = dropout, swap, jitter
        self.draws = dropout > 0.0 or swap > 0.0 or jitter > 0.0
        self.register_buffer("values", values, persistent=False)
        self.network = _projection(values.shape[1], dim)
        self.missing = nn.Parameter(torch.zeros(dim))

    def forward(self, rows: Rows) -> Tensor:
        num_rows = len(self.values)
        rows = rows.swapped(self.swap)
        unknown = rows.idx >= num_rows
        values = self.values[rows.idx.clamp(max=num_rows - 1)].to(self.missing.dtype)
        if rows.generator is not None and self.jitter > 0.0:
            flag = values[:, -1:]
            noise = rows.normal(values.shape[1] - 1) * (self.jitter * rows.share) * (1 - flag)
            values = torch.cat([values[:, :-1] + noise, flag], 1)
        hidden = rows.dropped(self.dropout)
        absent = unknown if hidden is None else unknown | hidden
        return torch.where(absent[:, None], self.missing, self.network(values))


class StatisticsPart(nn.Module):
    """Counts, age and time since last seen, as they stood at ``Rows.at``."""

    def __init__(
        self,
        index: TimeIndex,
        dim: int,
        *,
        windows_d: tuple[float, ...],
        age: bool,
        dropout: float,
        swap: float = 0.0,
    ) -> None:
        super().__init__()
        self.index, self.windows_d, self.age = index, windows_d, age
        self.dropout, self.swap = dropout, swap
        self.network = _projection(statistics_width(windows_d, age), dim)
        self.missing = nn.Parameter(torch.zeros(dim))

    def forward(self, rows: Rows) -> Tensor:
        rows = rows.swapped(self.swap)
        assert rows.at is not None, "statistics are only built for logs with time"
        values = statistics_at(
            self.index, rows.idx, rows.at, windows_d=self.windows_d, age=self.age
        )
        parts: Tensor = self.network(values)
        hidden = rows.dropped(self.dropout)
        return parts if hidden is None else torch.where(hidden[:, None], self.missing, parts)


def _vectors(table: Table, rows: Tensor) -> Tensor:
    vectors: Tensor = table(rows)
    return vectors


def _projection(width: int, dim: int) -> nn.Module:
    if width > _HIDDEN:
        return nn.Linear(width, dim)
    return nn.Sequential(nn.Linear(width, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, dim))
