"""One step over the graph of train: an entity is also what stands beside it.

Shape letters: M rows asked for, D embedding dimension.

LightGCN (He et al. 2020, eq. 3) for the rows of a step alone, instead of for all entities in every
step: the id vectors of a row's neighbours, each times (degree of the row · degree of the neighbour)
to the power -1/2, summed. What is served are the vectors this comes to, so nobody needs the graph
afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recclr.data.log import Csr
from recclr.kernels.bags import bags_of_distinct
from recclr.optim import Table
from recclr.ragged import ranges
from recclr.rows import Rows


class PropagationPart(nn.Module):
    """Sum over the items of a user, or over the users of an item; zero where there are none.

    Args:
        table: ids of the other side, row 0 the unknown one and row i + 1 entity i.
        neighbours: of each row, distinct. degrees: int64, those of the other side.
        weight: what the sum is multiplied by.
        most: neighbours that training adds up for a row: a stretch of them that starts anywhere,
            weighted up to stand for all; served are all. Bounds what a popular item costs.
    """

    offsets: Tensor
    near: Tensor
    weights: Tensor

    def __init__(
        self, table: Table, neighbours: Csr, degrees: Tensor, *, weight: float, most: int
    ) -> None:
        super().__init__()
        self.table, self.weight, self.most = table, weight, most
        offsets = torch.cat([neighbours.offsets, neighbours.offsets[-1:]])
        own = neighbours.lengths().clamp(min=1).float().rsqrt()
        theirs = degrees.clamp(min=1).float().rsqrt()
        weights = own[neighbours.row_numbers()] * theirs[neighbours.values.long()]
        self.draws = bool((neighbours.lengths() > most).any())
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("near", neighbours.values, persistent=False)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, rows: Rows) -> Tensor:
        """float32 [M, D]. A row's own target is no neighbour of it while it trains."""
        idx = rows.idx.clamp(max=len(self.offsets) - 2)
        start, stop = self.offsets[idx], self.offsets[idx + 1]
        places, share = self._places(start, stop, rows)
        owner = places.row_numbers()
        near = self.near[places.values].long()
        weights = self.weights[places.values] * (self.weight * share)[owner]
        if rows.generator is not None and rows.without is not None:
            targets = rows.without.view(len(idx), -1)[owner]
            weights = weights * (near.unsqueeze(1) != targets).all(1)
        hidden = rows.dropped(0.0)
        if hidden is not None:
            weights = weights * ~hidden[owner]
        return bags_of_distinct(
            near, places.offsets[:-1], weights, lambda distinct: self.table(distinct + 1)
        )

    def _places(self, start: Tensor, stop: Tensor, rows: Rows) -> tuple[Csr, Tensor]:
        """Which neighbours are added up, and by how much each row's are weighted up, [M]."""
        lengths = stop - start
        if rows.generator is None or not self.draws:
            return ranges(start, stop), torch.ones_like(lengths, dtype=torch.float32)
        taken = lengths.clamp(max=self.most)
        # Around the end of the row to its beginning, so that all are as likely.
        first = (rows.uniform() * lengths).long()
        places = ranges(first, first + taken)
        owner = places.row_numbers()
        inside = places.values % lengths[owner]
        share = lengths / taken.clamp(min=1)
        return Csr(places.offsets, start[owner] + inside), share.float()
