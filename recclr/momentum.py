"""A queue of positives of earlier steps, embedded by a slowly moving copy of the item tower.

MoCo (He et al., CVPR 2020) for items: many negatives for the price of a few, since they are
neither encoded nor differentiated again. They are as old as the queue is long, so the tower that
made them should not have moved much since: it is the exponential average of the trained one, or,
with momentum 0, that one itself, as in cross-batch negatives (CBNS, Wang et al., SIGIR 2021). How
far vectors have drifted apart is measured (``staleness``).

The average costs three passes over all weights of the item tower at each step, tables included;
with momentum 0 there is none.

Shape letters: B positives, Q places of the queue, F filled ones, S rows that stand for each, D
dimension, P pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from recclr.batches import POOL_CELLS, Batch
from recclr.data.log import Csr
from recclr.distributed import ALONE, Ranks
from recclr.errors import ConfigError
from recclr.kernels import PairMask
from recclr.kernels.native_rows import unique
from recclr.known_positives import KnownPositives
from recclr.negatives import Queued
from recclr.rows import Rows
from recclr.settings import LossSettings, QueueSettings
from recclr.sharded_tables import ShardedTable
from recclr.towers import TwoTower, saved_weights

# Vectors that are embedded again to see how far they are from today's.
_LOOKED_AT = 512
# Of a time cell and its neighbours: rows of the log for each of the cell.
_POOL = 2 * POOL_CELLS + 1


class MomentumQueue:
    """The last ``size`` positives and their vectors, first in, first out.

    All ranks push the same: each embeds its part of a batch, and the parts are put together in the
    order of the batch, which is that of one process.

    Args:
        model: on the training device. starts: number of the first batch that the queue serves; it
            fills before. time_cells: whether batches are such cells, of which the queue then also
            keeps the rows around them, from which its expected counts follow.
        bfloat16, chunk_size, ranks: as ``Objective`` has them.

    Attributes:
        state: what a resumed run needs: ``queue/vectors`` float32 [Q, D], ``queue/item_idx`` int64
            [Q], ``queue/pushed`` int64 scalar, how many ever were; place ``pushed`` modulo Q is
            written next; with time cells ``queue/pool_idx`` int64 [Q, S], ``queue/pool_count``
            float32 [Q, S] and ``queue/at`` int64 scalar, the moment of the latest batch;
            ``queue/tower/…`` of the averaged tower.

    Raises:
        ConfigError: the item tower has sharded tables.
    """

    def __init__(
        self,
        model: TwoTower,
        settings: QueueSettings,
        *,
        starts: int = 0,
        time_cells: bool = False,
        bfloat16: bool = False,
        chunk_size: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        _refuse_sharded(model.item_tower)
        self.size, self.momentum, self.starts = settings.size, settings.momentum, starts
        self.num_items, self.ranks = model.num_items, ranks
        self.bfloat16, self.chunk_size = bfloat16, chunk_size
        self.device = model.log_temperature.device
        self.tower = averaged_copy(model.item_tower) if self.momentum else model.item_tower
        self.weights = saved_weights(self.tower)
        self.embedder = _embedder(model, self.tower)
        self.at = torch.tensor(0, device=self.device) if time_cells else None
        first = torch.zeros(1, dtype=torch.int64, device=self.device)
        dim = self._embed(self.embedder, first, self.at).shape[1]
        self.vectors = torch.zeros(self.size, dim, device=self.device)
        self.item_idx = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        self.pushed = torch.zeros((), dtype=torch.int64, device=self.device)
        self.pool_idx = self.pool_count = None
        if time_cells:
            self.pool_idx = torch.zeros(self.size, _POOL, dtype=torch.int64, device=self.device)
            self.pool_count = torch.zeros(self.size, _POOL, device=self.device)

    @property
    def state(self) -> dict[str, Tensor]:
        """See above; always the same tensors."""
        found = {"vectors": self.vectors, "item_idx": self.item_idx, "pushed": self.pushed}
        if self.pool_idx is not None and self.pool_count is not None and self.at is not None:
            found |= {"pool_idx": self.pool_idx, "pool_count": self.pool_count, "at": self.at}
        if self.momentum:
            found |= {f"tower/{name}": value for name, value in self.weights.items()}
        return {f"queue/{name}": value.detach() for name, value in found.items()}

    @property
    def num_filled(self) -> int:
        """F, at most Q. Waits for a GPU."""
        return min(int(self.pushed), self.size)

    def queued(self, number: int) -> Queued | None:
        """What is in the queue, for the batch of a number; None while it warms up or is empty."""
        filled = self.num_filled
        if number < self.starts or not filled:
            return None
        items = self.item_idx[:filled]
        return Queued(items, self.vectors[:filled], filled, self._counts(items))

    def _counts(self, items: Tensor) -> Tensor | None:
        """Expected counts of all items by the rows around those in the queue, float32 [num_items];
        None without time cells.

        Args:
            items: int64 [F], what is in the queue.
        """
        if self.pool_idx is None or self.pool_count is None:
            return None
        around, own = self.pool_idx[: len(items)], self.pool_count[: len(items)]
        # In float64, so that the order of sums on a GPU shows in no bit of the result.
        counts = torch.zeros(self.num_items, dtype=torch.float64, device=self.device)
        counts = counts.scatter_add_(0, around.reshape(-1), own.double().reshape(-1)).float()
        # An item in the queue is one of the rows around it, also where those dealt to others have
        # left: of an expectation of nothing it would weigh without bound.
        least = counts.new_full(items.shape, 1 / _POOL)
        return counts.scatter_reduce_(0, items, least, "amax")

    @torch.no_grad()
    def advance(self, model: TwoTower, batches: Iterable[Batch]) -> None:
        """After an update: move the average towards the model, and push the positives it saw.

        Args:
            batches: of the step, in order; the same on all ranks.
        """
        if self.momentum:
            move_average(self.weights, saved_weights(model.item_tower), self.momentum)
        for batch in batches:
            if self.at is not None and batch.item_at is not None:
                self.at.copy_(batch.item_at)
            items, inverse = unique(batch.item_idx)
            own = items[slice(*self.ranks.part(len(items)))]
            vectors = self._embed(self.embedder, own, batch.item_at)
            counts = self.ranks.counts(len(items))
            vectors = self.ranks.gather(vectors, counts, "vectors for the queue")
            self.push(batch.item_idx, vectors[inverse], batch.pool)

    def push(self, item_idx: Tensor, vectors: Tensor, pool: Tensor | None = None) -> None:
        """Put the positives of a batch in, the last ones of it where they are more than places.

        Args:
            item_idx: int64 [B]. vectors: float32 [B, D]. pool: as ``Batch`` has it.
        """
        num_rows = len(item_idx)
        kept = torch.arange(max(num_rows - self.size, 0), num_rows, device=self.device)
        places = (self.pushed + kept) % self.size
        self.vectors.index_copy_(0, places, vectors.index_select(0, kept))
        self.item_idx.index_copy_(0, places, item_idx.index_select(0, kept))
        if self.pool_idx is not None and self.pool_count is not None:
            assert pool is not None, "a time cell has the rows around it"
            around, count = spread(pool.long(), num_rows)
            self.pool_idx.index_copy_(0, places, around.index_select(0, kept))
            self.pool_count.index_copy_(0, places, count.index_select(0, kept))
        self.pushed.add_(num_rows)

    @torch.no_grad()
    def staleness(self, model: TwoTower) -> float | None:
        """Mean cosine between vectors of the queue and the model's of the same items, in [-1, 1].

        Of 512 of them, evenly spread, at the moment of the latest batch, without the coordinates of
        a lift. None of an empty queue.
        """
        filled = self.num_filled
        if not filled:
            return None
        places = torch.linspace(0, filled - 1, min(filled, _LOOKED_AT), device=self.device).long()
        plain = _embedder(model, model.item_tower)
        today = self._embed(plain, self.item_idx[places], self.at)
        own = slice(0, today.shape[1] - model.num_lifted)
        return float(
            torch.cosine_similarity(today[:, own], self.vectors[places, own], dim=1).mean()
        )

    def _embed(self, embedder: TwoTower, item_idx: Tensor, at: Tensor | None) -> Tensor:
        """Vectors as they would be served, float32 [M, D]: nothing is dropped."""
        was_training = embedder.item_tower.training
        embedder.item_tower.eval()
        chunks = torch.split(item_idx, self.chunk_size or max(len(item_idx), 1))
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16),
        ):
            found = [embedder.embed_items(Rows(chunk, at)).float() for chunk in chunks]
        embedder.item_tower.train(was_training)
        return torch.cat(found)


def averaged_copy(tower: nn.Module) -> nn.Module:
    """A tower with weights of its own that starts as a copy; what is never saved it shares."""
    saved = tower.state_dict(keep_vars=True).keys()
    constants = (value for name, value in tower.named_buffers() if name not in saved)
    # Event times and features of all items: they follow from the log, and may be large.
    made = copy.deepcopy(tower, {id(value): value for value in constants})
    return made.requires_grad_(False).eval()


@torch.no_grad()
def move_average(average: dict[str, Tensor], present: dict[str, Tensor], momentum: float) -> None:
    """Average ← momentum · average + (1 - momentum) · present, in place; integers are copied."""
    names = [name for name, value in average.items() if value.is_floating_point()]
    if names:
        slow, fast = [average[name] for name in names], [present[name] for name in names]
        torch._foreach_mul_(slow, momentum)
        torch._foreach_add_(slow, fast, alpha=1 - momentum)
    for name in average.keys() - set(names):
        average[name].copy_(present[name])


def spread(pool: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The rows around a cell, dealt out to those in it, so that they leave the queue together.

    Args:
        pool: int64 [R] items. num_rows: B, of the cell.

    Returns:
        items int64 [B, S], and what each counts, float32 [B, S], B in all: the expected counts of a
        batch of B. Each row of the pool is once in it where R <= S·B; of more, which only a short
        cell at an end of the log has, S·B evenly chosen ones.
    """
    used = min(len(pool), _POOL * num_rows)
    slots = torch.arange(_POOL * num_rows, device=pool.device)
    chosen = (slots * len(pool) // max(used, 1)).clamp(max=len(pool) - 1)
    count = torch.where(slots < used, num_rows / max(used, 1), 0.0)
    # Slot k·B + e is with row e, which so has one of each cell's stretch of the pool.
    return pool[chosen].view(_POOL, num_rows).T, count.view(_POOL, num_rows).T


def mask_repeats(
    known: KnownPositives,
    user_idx: Tensor,
    positives: Tensor,
    candidate_idx: Tensor,
    *,
    also: Tensor | None = None,
) -> PairMask:
    """As ``KnownPositives.mask`` for candidates that come several times.

    Args:
        user_idx, positives: int64 [B]. candidate_idx: int64 [C], repeats allowed.
        also: as there.
    """
    distinct, inverse = unique(candidate_idx)
    mask = known.mask(user_idx, positives, distinct, also=also)
    numbers = torch.arange(len(candidate_idx), device=candidate_idx.device)
    columns = Csr.from_pairs(inverse, numbers, len(distinct)).take(mask.columns)
    return PairMask(mask.rows[columns.row_numbers()], columns.values.long())


def _embedder(model: TwoTower, tower: nn.Module) -> TwoTower:
    """What makes vectors of items as the model does, with another tower."""
    return TwoTower(
        nn.Identity(),
        tower,
        num_users=model.num_users,
        num_items=model.num_items,
        similarity=model.similarity,
        loss=LossSettings(),
    )


def _refuse_sharded(tower: nn.Module) -> None:
    for name, part in tower.named_modules():
        if isinstance(part, ShardedTable):
            raise ConfigError(
                f"negatives.queue: table {name} of the item tower is sharded, and the average of "
                "the tower is not; leave out negatives.queue or train.sharded_tables"
            )
