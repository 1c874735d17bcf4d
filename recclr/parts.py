"""What a tower adds up: one part per id, feature or history, each giving [M, D].

Shape letters: M rows asked for, D embedding dimension, W width of a dense feature.

A part gets ``Rows``: the entities and the moment they are seen at. Row ``num_rows`` of every table
is the entity nothing is known of; each part has a learned vector for it, and dropout trains that
vector by showing it in place of known ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from recclr.data.log import CategoricalColumn, Csr, RaggedColumn
from recclr.distinct import padded_distinct
from recclr.optim import Table
from recclr.statistics import DAY_S, TimeIndex, statistics_at, statistics_width

_HIDDEN = 32


@dataclass(frozen=True)
class Rows:
    """Entities as a tower is asked for them.

    Attributes:
        idx: int64 [M]; at or above the number of entities: unknown.
        at: int64 seconds, scalar or [M]; None in a log without time.
        without: int64 [M], item left out of the row's own history where that has no time: its
            target; or [M, P], items left out of it in any case: all its positives; or None.
        generator: source of dropout; None at inference, when nothing is dropped.
        whole: the rows of a step of which these are a part, or None. places: where these stand
            among them. Draws are made for the whole, so that what is dropped does not depend on the
            number of ranks, nor on that of chunks.
        fixed_shapes: ragged rows are padded to the longest there is, and nothing waits for a GPU.
    """

    idx: Tensor
    at: Tensor | None = None
    without: Tensor | None = None
    generator: torch.Generator | None = None
    whole: Rows | None = None
    places: Tensor | slice | None = None
    fixed_shapes: bool = False

    def part(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` of these, for one of several ranks, or a chunk of its rows."""
        own = slice(start, stop)
        at = self.at if self.at is None or self.at.ndim == 0 else self.at[own]
        without = None if self.without is None else self.without[own]
        if self.whole is None:
            return Rows(self.idx[own], at, without, self.generator, self, own)
        # A part of a part is one of the same whole.
        places = self.places
        if isinstance(places, slice):
            places = slice(places.start + start, min(places.start + stop, places.stop))
        elif places is not None:
            places = places[own]
        return Rows(self.idx[own], at, without, self.generator, self.whole, places)

    def uniform(self, *shape: int) -> Tensor:
        """Draws from [0, 1), float32 [M, *shape]; only where there is a generator."""
        of = self if self.whole is None else self.whole
        size = (len(of.idx), *shape)
        draws = torch.rand(size, generator=self.generator, device=self.idx.device)
        return draws if self.whole is None else draws[self.places]

    def dropped(self, probability: float) -> Tensor | None:
        """Bool [M]: rows whose part is hidden in this step; None for none."""
        if self.generator is None or probability == 0.0:
            return None
        return self.uniform() < probability


class IdPart(nn.Module):
    """The id embedding. Table row 0 is the unknown id, row i + 1 entity i.

    Where training never shows the unknown id (no dropout, no ``first_seen``), an unknown entity
    gets the mean of the known ones.

    Args:
        known: bool [num_rows]: entities with a train interaction.
        first_seen: int64 [num_rows] seconds: with it, an id counts only after that moment.
    """

    known: Tensor
    first_seen: Tensor | None

    def __init__(
        self, table: Table, known: Tensor, *, dropout: float, first_seen: Tensor | None = None
    ) -> None:
        super().__init__()
        self.table = table
        self.dropout = dropout
        beyond = torch.zeros(1, dtype=torch.bool)
        self.register_buffer("known", torch.cat([known, beyond]), persistent=False)
        self.register_buffer("first_seen", first_seen, persistent=False)
        # Without any unknown row to serve the lookup is the bare table (the fast path).
        self.always = bool(known.all()) and dropout == 0.0 and first_seen is None
        self.trains_unknown = dropout > 0.0 or first_seen is not None

    def forward(self, rows: Rows) -> Tensor:
        num_rows = len(self.known) - 1
        if self.always and rows.generator is not None:
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

    def __init__(self, table: Table, column: CategoricalColumn, *, dropout: float) -> None:
        super().__init__()
        self.table = table
        self.dropout = dropout
        idx = torch.cat([column.idx.long(), torch.zeros(1, dtype=torch.int64)])
        self.register_buffer("idx", idx, persistent=False)

    def forward(self, rows: Rows) -> Tensor:
        idx = self.idx[rows.idx.clamp(max=len(self.idx) - 1)]
        hidden = rows.dropped(self.dropout)
        return _vectors(self.table, idx if hidden is None else idx.masked_fill(hidden, 0))


class BagPart(nn.Module):
    """Mean over any number of categories; the last table row stands for none."""

    offsets: Tensor
    values: Tensor

    def __init__(self, table: Table, column: RaggedColumn, *, dropout: float) -> None:
        super().__init__()
        self.table = table
        self.dropout = dropout
        offsets = torch.cat([column.csr.offsets, column.csr.offsets[-1:]])
        self.longest = _longest(offsets)
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("values", column.csr.values, persistent=False)

    def forward(self, rows: Rows) -> Tensor:
        pooled, lengths = (self._padded if rows.fixed_shapes else self._ragged)(rows.idx)
        pooled = pooled / lengths.clamp(min=1)[:, None]
        hidden = rows.dropped(self.dropout)
        absent = lengths == 0 if hidden is None else (lengths == 0) | hidden
        # Looked up once, whatever the number of empty bags.
        last = torch.full((1,), self.table.num_rows - 1, device=lengths.device)
        return torch.where(absent[:, None], _vectors(self.table, last), pooled)

    def _ragged(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the vectors of each bag, and how many there are."""
        csr = Csr(self.offsets, self.values)
        bags = csr.take(idx.clamp(max=csr.num_rows - 1))
        return self.table.bag(bags.values.long(), bags.offsets[:-1]), bags.lengths()

    def _padded(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        idx = idx.clamp(max=len(self.offsets) - 2)
        start, stop = self.offsets[idx], self.offsets[idx + 1]
        if not self.longest:
            return self.table.weight.new_zeros((len(idx), self.table.dim)), stop - start
        places, alive = _grid(start, stop, self.longest, len(self.values))
        # Beyond its end a bag asks for the row that is looked up below in any case.
        values = torch.where(alive, self.values[places].long(), self.table.num_rows - 1)
        return self.table.padded_bag(values, alive), stop - start


class DensePart(nn.Module):
    """A fixed vector per entity through a small network, or one linear layer if it is wide."""

    values: Tensor

    def __init__(self, values: Tensor, dim: int, *, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.register_buffer("values", values, persistent=False)
        self.network = _projection(values.shape[1], dim)
        self.missing = nn.Parameter(torch.zeros(dim))

    def forward(self, rows: Rows) -> Tensor:
        num_rows = len(self.values)
        unknown = rows.idx >= num_rows
        values = self.values[rows.idx.clamp(max=num_rows - 1)].to(self.missing.dtype)
        hidden = rows.dropped(self.dropout)
        absent = unknown if hidden is None else unknown | hidden
        return torch.where(absent[:, None], self.missing, self.network(values))


class StatisticsPart(nn.Module):
    """Counts, age and time since last seen, as they stood at ``Rows.at``."""

    def __init__(
        self, index: TimeIndex, dim: int, *, windows_d: tuple[float, ...], age: bool, dropout: float
    ) -> None:
        super().__init__()
        self.index, self.windows_d, self.age, self.dropout = index, windows_d, age, dropout
        self.network = _projection(statistics_width(windows_d, age), dim)
        self.missing = nn.Parameter(torch.zeros(dim))

    def forward(self, rows: Rows) -> Tensor:
        assert rows.at is not None, "statistics are only built for logs with time"
        values = statistics_at(
            self.index, rows.idx, rows.at, windows_d=self.windows_d, age=self.age
        )
        parts: Tensor = self.network(values)
        hidden = rows.dropped(self.dropout)
        return parts if hidden is None else torch.where(hidden[:, None], self.missing, parts)


class HistoryPart(nn.Module):
    """The user's items before the moment asked for, pooled with recency weights.

    Pooled as Σ w·v / sqrt(Σ w²), so that the length of the pooled vector depends neither on how
    many items there are nor on how long ago the newest one was. Point in time: only events strictly
    before ``at`` count. Without time, all the user's items but the target count.

    Args:
        items: item parts whose sum represents an item: its id, its features, or both.
        user_items: items per user, oldest first. index: their times, in the same order, or None.
    """

    offsets: Tensor
    items: Tensor

    def __init__(
        self,
        items: Sequence[nn.Module],
        user_items: Csr,
        index: TimeIndex | None,
        *,
        dim: int,
        length: int,
        half_life_d: float | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.item_parts, self.index = nn.ModuleList(items), index
        self.length, self.half_life_d, self.dropout = length, half_life_d, dropout
        self.items_drop = any(getattr(part, "dropout", 0.0) > 0 for part in items)
        offsets = torch.cat([user_items.offsets, user_items.offsets[-1:]])
        self.longest = min(length, _longest(offsets))
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("items", user_items.values, persistent=False)
        self.missing = nn.Parameter(torch.zeros(dim))

    def forward(self, rows: Rows) -> Tensor:
        start, stop = self._span(rows)
        if rows.fixed_shapes and self.longest:
            return self._padded(start, stop, rows)
        positions = _ranges(start, stop)
        owner = positions.row_numbers()
        items = self.items[positions.values]
        weights = self._weights(positions.values, (stop - 1)[owner])
        if rows.without is not None and rows.without.ndim == 2:
            weights = weights * (items[:, None] != rows.without[owner]).all(1)
        elif rows.without is not None and self._timeless(rows):
            weights = weights * (items != rows.without[owner])
        return self._pooled(Csr(positions.offsets, items), weights, rows)

    def _timeless(self, rows: Rows) -> bool:
        return self.index is None or rows.at is None

    def _span(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Where in ``items`` the history of each row begins, and where it ends."""
        idx = rows.idx.clamp(max=len(self.offsets) - 2)
        start, stop = self.offsets[idx], self.offsets[idx + 1]
        if self.index is not None and rows.at is not None:
            known = idx < len(self.index.first_seen)
            rank = self.index.rank(torch.where(known, idx, 0), rows.at)
            stop = torch.where(known, rank, stop)
        return torch.maximum(start, stop - self.length), stop

    def _padded(self, start: Tensor, stop: Tensor, rows: Rows) -> Tensor:
        """The same with a place for every item that a history could have: B · longest vectors."""
        assert rows.without is not None, "padded rows are those of a training step"
        places, alive = _grid(start, stop, self.longest, len(self.items))
        items = self.items[places].long()
        weights = self._weights(places, (stop - 1).clamp(min=0)[:, None])
        weights = torch.where(alive, weights, 0.0)
        if self._timeless(rows):
            weights = weights * (items != rows.without[:, None])
        # Beyond its end a history asks for an item that another has, or for one that the item
        # tower is asked for: an optimiser moves what was looked up, be its gradient zero.
        others = torch.cat([items.reshape(-1), rows.without[:1]])
        some = torch.cat([alive.reshape(-1), torch.ones_like(alive[0, :1])])
        spare = others.index_select(0, some.int().argmax().view(1))
        flat = torch.where(alive, items, spare).reshape(-1)
        wanted = Rows(flat, generator=rows.generator, fixed_shapes=True)
        if self.items_drop and rows.generator is not None:
            found = padded_distinct(flat, len(flat))
            first = found.order[found.starts()[found.inverse()]]
            wanted = replace(wanted, whole=wanted, places=first)
        vectors = torch.stack([part(wanted) for part in self.item_parts]).sum(0)
        pooled = (vectors.view(*places.shape, -1) * weights[:, :, None]).sum(1)
        return self._shown(pooled, weights.square().sum(1), rows.dropped(self.dropout))

    def _shown(self, pooled: Tensor, squares: Tensor, hidden: Tensor | None) -> Tensor:
        """Scaled; the missing vector where there is nothing or it is hidden."""
        absent = squares <= 0 if hidden is None else (squares <= 0) | hidden
        pooled = pooled / squares.sqrt().clamp_min(1e-12)[:, None]
        return torch.where(absent[:, None], self.missing, pooled)

    def _pooled(self, bags: Csr, weights: Tensor, rows: Rows) -> Tensor:
        distinct, inverse = torch.unique(bags.values.long(), return_inverse=True)
        squares = torch.zeros(bags.num_rows, device=weights.device)
        squares.index_add_(0, bags.row_numbers(), weights**2)
        hidden = rows.dropped(self.dropout)
        wanted = self._wanted(distinct, rows)
        # Also without any item: the tables of another rank may wait for this lookup.
        vectors = torch.stack([part(wanted) for part in self.item_parts]).sum(0)
        if not len(distinct):
            return self.missing.expand(bags.num_rows, -1)
        pooled = nn.functional.embedding_bag(
            inverse, vectors, bags.offsets[:-1], mode="sum", per_sample_weights=weights
        )
        return self._shown(pooled, squares, hidden)

    def _wanted(self, distinct: Tensor, rows: Rows) -> Rows:
        """The items of all histories; if they draw, as a part of those of the whole step."""
        if rows.whole is None or rows.generator is None or not self.items_drop:
            return Rows(distinct, generator=rows.generator)
        every = torch.unique(self.items[_ranges(*self._span(rows.whole)).values].long())
        if not len(every):
            return Rows(distinct, generator=rows.generator)
        places = torch.searchsorted(every, distinct)
        return Rows(distinct, None, None, rows.generator, Rows(every), places)

    def _weights(self, places: Tensor, newest: Tensor) -> Tensor:
        """Of the items at ``places``, by the place of the newest of each one's history."""
        if self.half_life_d is None or self.index is None:
            return torch.ones(places.shape, device=places.device)
        # Pooling cancels a common factor, so age counts from the newest item: counted from the
        # moment asked for, all weights of a user who stayed away for long would underflow.
        age_s = (
            self.index.keys[newest] % self.index.span - self.index.keys[places] % self.index.span
        )
        return torch.exp2(age_s.float() / DAY_S / -self.half_life_d)


def _vectors(table: Table, rows: Tensor) -> Tensor:
    vectors: Tensor = table(rows)
    return vectors


def _ranges(start: Tensor, stop: Tensor) -> Csr:
    """Row r holds the numbers start[r], …, stop[r] - 1; empty where stop <= start."""
    lengths = (stop - start).clamp(min=0)
    offsets = torch.zeros(len(start) + 1, dtype=torch.int64, device=start.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    values = torch.arange(int(offsets[-1]), device=start.device)
    values += (start - offsets[:-1]).repeat_interleave(lengths, output_size=len(values))
    return Csr(offsets, values)


def _longest(offsets: Tensor) -> int:
    """Of ragged rows; 0 where there are none."""
    return int(offsets.diff().max()) if len(offsets) > 1 else 0


def _grid(start: Tensor, stop: Tensor, width: int, size: int) -> tuple[Tensor, Tensor]:
    """As ``_ranges``, padded: numbers below ``size`` [M, width], and which of them are meant."""
    numbers = start[:, None] + torch.arange(width, device=start.device)
    return numbers.clamp(max=size - 1), numbers < stop[:, None]


def _projection(width: int, dim: int) -> nn.Module:
    if width > _HIDDEN:
        return nn.Linear(width, dim)
    return nn.Sequential(nn.Linear(width, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, dim))
