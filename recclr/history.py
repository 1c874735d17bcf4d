"""The history of a user as a part of the tower: the items before a moment, pooled.

Shape letters: B rows asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from recclr.data.log import Csr
from recclr.distinct import padded_distinct
from recclr.kernels.bags import bags_of_distinct
from recclr.ragged import grid, longest, ranges
from recclr.rows import Rows
from recclr.sequences import Shuffle, cropped
from recclr.statistics import DAY_S, TimeIndex


class HistoryPart(nn.Module):
    """The user's items before the moment asked for, pooled with recency weights.

    Pooled as Σ w·v / sqrt(Σ w²), so that the length of the pooled vector depends neither on how
    many items there are nor on how long ago the newest one was. Point in time: only events strictly
    before ``at`` count. Without time, all the user's items but the target count.

    Args:
        items: item parts whose sum represents an item: its id, its features, or both.
        user_items: items per user, oldest first. index: their times, in the same order, or None.
        crop, mask, reorder: what training leaves of a history; see ``sequences``.
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
        crop: float = 1.0,
        mask: float = 0.0,
        reorder: float = 0.0,
    ) -> None:
        super().__init__()
        self.item_parts, self.index = nn.ModuleList(items), index
        self.length, self.half_life_d, self.dropout = length, half_life_d, dropout
        self.crop, self.mask, self.reorder = crop, mask, reorder
        self.draws = crop < 1.0 or mask > 0.0 or reorder > 0.0
        self.items_draw = any(getattr(part, "draws", False) for part in items)
        offsets = torch.cat([user_items.offsets, user_items.offsets[-1:]])
        self.longest = min(length, longest(offsets))
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("items", user_items.values, persistent=False)
        self.missing = nn.Parameter(torch.zeros(dim))

    def forward(self, rows: Rows) -> Tensor:
        start, stop = self._span(rows)
        seeds = rows.seeds() if self.draws and rows.generator is not None else None
        if seeds is not None:
            start, stop = cropped(start, stop, 1.0 - (1.0 - self.crop) * rows.share, seeds)
        if rows.fixed_shapes and self.longest:
            return self._padded(start, stop, rows, seeds)
        positions = ranges(start, stop)
        owner = positions.row_numbers()
        items = self.items[positions.values]
        weights = self._weights(positions.values, (stop - 1)[owner])
        if seeds is not None:
            weights = self._shuffle(rows).flat(weights, positions.offsets, owner, seeds)
        if rows.without is not None and rows.without.ndim == 2:
            weights = weights * (items[:, None] != rows.without[owner]).all(1)
        elif rows.without is not None and self._timeless(rows):
            weights = weights * (items != rows.without[owner])
        return self._pooled(Csr(positions.offsets, items), weights, rows)

    def _shuffle(self, rows: Rows) -> Shuffle:
        return Shuffle(self.mask * rows.share, self.reorder * rows.share)

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

    def _padded(self, start: Tensor, stop: Tensor, rows: Rows, seeds: Tensor | None) -> Tensor:
        """The same with a place for every item that a history could have: B · longest vectors."""
        assert rows.without is not None, "padded rows are those of a training step"
        places, alive = grid(start, stop, self.longest, len(self.items))
        items = self.items[places].long()
        weights = self._weights(places, (stop - 1).clamp(min=0)[:, None])
        if seeds is not None:
            weights = self._shuffle(rows).padded(weights, stop - start, seeds)
        weights = torch.where(alive, weights, 0.0)
        if self._timeless(rows):
            weights = weights * (items != rows.without[:, None])
        # Beyond its end a history asks for an item that another has, or for one that the item
        # tower is asked for: an optimiser moves what was looked up, be its gradient zero.
        others = torch.cat([items.reshape(-1), rows.without[:1]])
        some = torch.cat([alive.reshape(-1), torch.ones_like(alive[0, :1])])
        spare = others.index_select(0, some.int().argmax().view(1))
        flat = torch.where(alive, items, spare).reshape(-1)
        wanted = replace(self._items(flat, rows), fixed_shapes=True)
        if self.items_draw and rows.generator is not None:
            # One draw for an item, wherever it stands.
            found = padded_distinct(flat, len(flat))
            wanted = replace(wanted, whole=Rows(found.values), places=found.inverse())
        vectors = self._vectors(wanted)
        pooled = (vectors.view(*places.shape, -1) * weights[:, :, None]).sum(1)
        return self._shown(pooled, weights.square().sum(1), rows.dropped(self.dropout))

    def _shown(self, pooled: Tensor, squares: Tensor, hidden: Tensor | None) -> Tensor:
        """Scaled; the missing vector where there is nothing or it is hidden."""
        absent = squares <= 0 if hidden is None else (squares <= 0) | hidden
        pooled = pooled / squares.sqrt().clamp_min(1e-12)[:, None]
        return torch.where(absent[:, None], self.missing, pooled)

    def _pooled(self, bags: Csr, weights: Tensor, rows: Rows) -> Tensor:
        squares = torch.zeros(bags.num_rows, device=weights.device)
        squares.index_add_(0, bags.row_numbers(), weights**2)
        hidden = rows.dropped(self.dropout)
        pooled = bags_of_distinct(
            bags.values.long(),
            bags.offsets[:-1],
            weights,
            lambda distinct: self._vectors(self._wanted(distinct, rows)),
        )
        return self._shown(pooled, squares, hidden)

    def _wanted(self, distinct: Tensor, rows: Rows) -> Rows:
        """The items of all histories; if they draw, as a part of those of the whole step."""
        wanted = self._items(distinct, rows)
        if rows.generator is None or not self.items_draw:
            return wanted
        # Of a cropped history all items, since a part does not know the stretches of others.
        whole = rows if rows.whole is None else rows.whole
        if rows.whole is None and self.crop == 1.0:
            return wanted
        every = torch.unique(self.items[ranges(*self._span(whole)).values].long())
        if not len(every):
            return wanted
        return replace(wanted, whole=Rows(every), places=torch.searchsorted(every, distinct))

    def _vectors(self, wanted: Rows) -> Tensor:
        first, *others = (part(wanted) for part in self.item_parts)
        vectors: Tensor = sum(others, first)
        return vectors

    def _items(self, idx: Tensor, rows: Rows) -> Rows:
        """As the item parts are asked for them on behalf of ``rows``."""
        return Rows(idx, generator=rows.generator, view=rows.view, share=rows.share)

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
