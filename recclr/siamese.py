"""One tower for both sides: items as queries of items, and users as the mean of their last items.

Shape letters: U users, V items, M rows asked for, D dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from recclr.building import build_tower, served_bias
from recclr.co_interactions import last_items
from recclr.data.log import Prepared
from recclr.distributed import ALONE, Ranks
from recclr.optim import Table
from recclr.settings import LossSettings, ModelSettings, TowerSettings
from recclr.sharded_tables import NewTable
from recclr.similarity import as_queries
from recclr.towers import TwoTower


class Siamese(TwoTower):
    """A two-tower model whose towers are one module, so that score(a, b) = score(b, a).

    Trained on pairs of items (``co_interactions``), whose query side is asked for items by
    ``embed_users``. Served to users as the mean of the vectors of their last items.

    Args:
        tower: maps ``Rows`` of items to float32 [M, D].
        prepared: whose users are served.
        query_length: of how many last items a user is the mean.
        similarity, loss, item_bias: as in ``TwoTower``.
    """

    offsets: Tensor
    last: Tensor
    counts: Tensor

    def __init__(
        self,
        tower: torch.nn.Module,
        prepared: Prepared,
        *,
        similarity: str,
        loss: LossSettings,
        query_length: int,
        item_bias: Tensor | None = None,
    ) -> None:
        log = prepared.train
        super().__init__(
            tower,
            tower,
            num_users=log.num_users,
            num_items=log.num_items,
            similarity=similarity,
            loss=loss,
            item_bias=item_bias,
        )
        last = last_items(log, query_length)
        self.register_buffer("offsets", last.offsets, persistent=False)
        self.register_buffer("last", last.values.long(), persistent=False)
        self.register_buffer("counts", log.item_counts().float(), persistent=False)

    @torch.no_grad()
    def all_embeddings(self, cutoff: int | None, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
        """As ``TwoTower.all_embeddings``; a user without items is served as unknown ones are, by
        the mean of all items, each as often as train has it.
        """
        items = self._every(self.embed_items, self.num_items, cutoff, ranks)
        own = items[:, : items.shape[1] - self.num_lifted]
        pooled = embedding_bag(self.last, own, self.offsets[:-1], mode="mean")
        average = (self.counts @ own / self.counts.sum()).unsqueeze(0)
        pooled = torch.where((self.offsets.diff() > 0).unsqueeze(1), pooled, average)
        return as_queries(torch.cat([pooled, average]), self.similarity), items


def build_siamese(
    prepared: Prepared,
    *,
    item: TowerSettings,
    model: ModelSettings,
    loss: LossSettings,
    seed: int,
    new_table: NewTable = Table,
) -> Siamese:
    """The model for the given data, freshly initialised on the CPU.

    Raises:
        ConfigError: as ``towers.build_model``.
    """
    tower = build_tower("item", item, prepared, model=model, seed=seed, new_table=new_table)
    return Siamese(
        tower,
        prepared,
        similarity=model.similarity,
        loss=loss,
        query_length=model.pairs.query_length,
        item_bias=served_bias(model, prepared.train),
    )
