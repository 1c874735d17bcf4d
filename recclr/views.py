"""Terms of the loss that need no interaction: two views of entities, told from all others.

A view is an entity as dropout shows it: each part of its tower is hidden at a rate of its own and
at one more, so that what is left must say who it is (Yao et al. 2021, "Self-supervised Learning for
Large-scale Item Recommendations"). Uniform draws reach entities that the log has never seen.

Of several ranks each embeds its part of the entities and computes its part of the terms, as it does
of the main loss; draws are those of one process.

Shape letters: M entities of a step, B rows of a batch, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from recclr.batches import Batch
from recclr.caching import Embed, Encoding
from recclr.data.log import EncodedLog
from recclr.distributed import ALONE, Ranks
from recclr.ntxent import nt_xent
from recclr.order import generator, mix, permuted
from recclr.rows import Rows
from recclr.settings import SelfSupervisionSettings, ViewSettings
from recclr.towers import TwoTower

_DRAW, _VIEW, _HEAD = 41, 42, 43
_SIDES = ("item", "user")


class TwoViews:
    """NT-Xent on two views of entities of one tower, through a head that is no part of the model.

    Args:
        side: ``item`` or ``user``. dim: D. device: where the head is made.

    Attributes:
        head: D to ``projection`` by way of one hidden layer; the identity where that is 0.
    """

    def __init__(
        self,
        side: str,
        settings: ViewSettings,
        *,
        dim: int,
        seed: int,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.side, self.settings, self.seed, self.ranks = side, settings, seed, ranks
        self.key = _SIDES.index(side)
        self.head = _head(dim, settings.projection, mix(seed, _HEAD, self.key)).to(device)

    def loss(
        self,
        encode: Encoding,
        embed: Embed,
        idx: Tensor,
        at: Tensor | None,
        number: int,
        progress: float = 0.0,
    ) -> Tensor:
        """This rank's part of the term, float32 scalar; the parts of all ranks sum up to it.

        Args:
            encode: how towers are run. embed: the tower, with its normalisation.
            idx: int64 [M], repeats allowed. at: int64 seconds, scalar or [M], or None.
            number: keys what the views hide. progress: as ``Rows`` has it.
        """
        num_rows = len(idx)
        part, counts = self.ranks.part(num_rows), self.ranks.counts(num_rows)
        views = []
        for view in range(2):
            rows = self.rows(idx, at, number, view, progress)
            rows = rows if self.ranks.size == 1 else rows.part(*part)
            views.append(self.head(encode(embed, rows, max(counts)).float()))
        both = self.ranks.gather_rows(torch.cat(views, dim=1), counts, f"views of {self.side}s")
        first, second = both.chunk(2, dim=1)
        return nt_xent(first, second, self.settings.temperature, entity_idx=idx, part=part)

    def rows(
        self, idx: Tensor, at: Tensor | None, number: int, view: int, progress: float = 0.0
    ) -> Rows:
        """What the tower is asked for in one of the two views."""
        # Two views start from one state, and draw side by side from there.
        draws = generator(idx.device, self.seed, number, _VIEW, self.key)
        hide = self.settings.dropout
        return Rows(idx, at, None, draws, view=view, progress=progress, hide_rate=hide)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Of the head, by names that no weight of a model has."""
        named = self.head.named_parameters(prefix=f"self_supervision.{self.side}")
        return dict(named)


class EntityDraws:
    """Which entities a step shows two views of, and at which moment.

    Args:
        counts: int64 [at least num_entities], train rows of each.
    """

    def __init__(
        self, side: str, settings: ViewSettings, num_entities: int, counts: Tensor, *, seed: int
    ) -> None:
        self.side, self.settings, self.num_entities, self.seed = side, settings, num_entities, seed
        self.key = _SIDES.index(side)
        self.cumulative = counts[:num_entities].cumsum(0)
        self.num_rows = int(self.cumulative[-1])

    def __call__(self, batch: Batch, number: int) -> tuple[Tensor, Tensor | None]:
        """Entities int64 [M], and moments int64 [M] or scalar, None without time.

        Items are shown at the moment that all items of the batch are; a user at that of a row of
        the batch: the own one where users are drawn from there, else any.
        """
        size, device = self.settings.batch_size, batch.item_idx.device
        draws = generator(device, self.seed, number, _DRAW, self.key)
        num_rows = len(batch.item_idx)
        rows = None
        if self.settings.distribution == "batch":
            rows = self._distinct(min(size, num_rows), num_rows, number, device)
            idx = (batch.item_idx if self.side == "item" else batch.user_idx)[rows]
        elif self.settings.distribution == "uniform":
            count = min(size, self.num_entities)
            idx = self._distinct(count, self.num_entities, number, device)
        else:
            idx = self._by_popularity(size, draws, device)
        if self.side == "item":
            return idx, batch.item_at
        if batch.user_at is None:
            return idx, None
        if rows is None:
            rows = torch.randint(num_rows, (len(idx),), generator=draws, device=device)
        return idx, batch.user_at[rows]

    def _distinct(self, count: int, size: int, number: int, device: torch.device) -> Tensor:
        """``count`` different numbers below ``size``, every set of them alike, int64."""
        places = torch.arange(count, device=device)
        return permuted(places, size, self.seed, number, _DRAW, self.key)

    def _by_popularity(self, count: int, draws: torch.Generator, device: torch.device) -> Tensor:
        """Whose row a row of train is, drawn uniformly, int64; repeats come."""
        rows = torch.randint(self.num_rows, (count,), generator=draws, device=device)
        return torch.searchsorted(self.cumulative, rows, right=True)


class SelfSupervision:
    """The terms of both towers.

    Args:
        model: on the training device; asked for the width of its embeddings where there is a head.
        log: train rows, on the same device or mapped.
        ranks: who shares the step, all of which make this together.
    """

    def __init__(
        self,
        settings: SelfSupervisionSettings,
        model: TwoTower,
        log: EncodedLog,
        *,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.views: dict[str, TwoViews] = {}
        self.draws: dict[str, EntityDraws] = {}
        for side in _SIDES:
            of: ViewSettings | None = getattr(settings, side)
            if of is None:
                continue
            embed = shown_by(model, side)
            dim = _width(model, embed, log) if of.projection else 0
            self.views[side] = TwoViews(
                side, of, dim=dim, seed=seed, device=log.device, ranks=ranks
            )
            users = side == "user"
            count = log.num_users if users else log.num_items
            counts = log.user_counts() if users else log.item_counts()
            self.draws[side] = EntityDraws(side, of, count, counts, seed=seed)

    def terms(
        self, model: TwoTower, batch: Batch, number: int, encode: Encoding, progress: float = 0.0
    ) -> Iterator[tuple[str, float, Tensor]]:
        """Name, weight and value of each term; the graph of one at a time, if each is used up.

        Args:
            batch: the first one of the step, and ``number`` its number. progress: of the training.
        """
        for side, views in self.views.items():
            idx, at = self.draws[side](batch, number)
            loss = views.loss(encode, shown_by(model, side), idx, at, number, progress)
            yield f"{side}_nt_xent", views.settings.weight, loss

    def parameters(self) -> dict[str, nn.Parameter]:
        """Of the heads, for the optimiser."""
        return {n: p for views in self.views.values() for n, p in views.parameters().items()}

    def state(self) -> dict[str, Tensor]:
        """The same as plain tensors of the same memory, for checkpoints."""
        return {name: p.detach() for name, p in self.parameters().items()}


def shown_by(model: TwoTower, side: str) -> Embed:
    """A tower as views of it are compared: by angles, which the coordinates of a lift would hide.

    Returns:
        from ``Rows`` to float [M, D]: of unit length under cosine, else as the tower gives them.
    """
    if model.num_lifted:
        tower: Embed = model.item_tower if side == "item" else model.user_tower
        return tower
    return model.embed_items if side == "item" else model.embed_users


@torch.no_grad()
def _width(model: TwoTower, embed: Embed, log: EncodedLog) -> int:
    """D, also of a tower of one's own, which need not say it."""
    was_training, first = model.training, torch.zeros(1, dtype=torch.int64, device=log.device)
    # A tower of one's own may draw while it trains.
    model.eval()
    width = int(embed(Rows(first, None if log.timestamp is None else first[0])).shape[1])
    model.train(was_training)
    return width


def _head(dim: int, width: int, seed: int) -> nn.Module:
    if not width:
        return nn.Identity()
    # Layers draw from torch's global generator when they are made.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width))
