"""Two towers from a configuration, without model code.

A tower is the sum of its parts (``parts``), an optional residual MLP, and what its ``similarity``
makes of that. Any ``nn.Module`` that maps ``Rows`` to float32 [M, D] may take a tower's place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from recclr.augment import Augmentation
from recclr.distributed import ALONE, Ranks
from recclr.errors import ConfigError
from recclr.losses import automatic_temperature
from recclr.optim import Table
from recclr.rows import Rows
from recclr.settings import (
    WITH_TEMPERATURE,
    LossSettings,
)
from recclr.sharded_tables import RowShard, ShardedTable
from recclr.similarity import LIFTED, as_candidates, as_queries, with_bias

# Rows that a tower embeds at once outside of training; a rank takes whole stretches of them.
_CHUNK = 8_192


class ResidualBlock(nn.Module):
    """x + W₂·gelu(W₁·norm(x)); starts as the identity, so a block cannot hurt at first."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.rise = nn.Linear(dim, hidden)
        self.fall = nn.Linear(hidden, dim)
        nn.init.zeros_(self.fall.weight)
        nn.init.zeros_(self.fall.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fall(nn.functional.gelu(self.rise(self.norm(x))))
        return x + y


class Tower(nn.Module):
    """Sum of parts, residual MLP, coordinate dropout.

    Args:
        parts: by feature name; each maps ``Rows`` to [M, D].
        augment: what training hides and blurs, or None.
    """

    def __init__(
        self,
        parts: dict[str, nn.Module],
        dim: int,
        *,
        mlp: tuple[int, ...],
        dropout: float,
        augment: Augmentation | None = None,
    ) -> None:
        super().__init__()
        if not parts:
            raise ConfigError("a tower needs an id, a feature or a history; all are switched off")
        # A feature may bear any name, and a module's key may not hold a dot.
        self.names = tuple(parts)
        self.parts = nn.ModuleList(parts.values())
        self.blocks = nn.ModuleList(ResidualBlock(dim, hidden) for hidden in mlp)
        self.dropout, self.augment = dropout, augment
        # Where every part is small this is what all entities share, popularity's direction.
        self.bias = None if tuple(parts) == ("id",) else nn.Parameter(torch.zeros(dim))

    def forward(self, rows: Rows) -> Tensor:
        """float32 [M, D], not normalised."""
        hidden: dict[str, Tensor] = {}
        if self.augment is not None and rows.generator is not None:
            rows = self.augment.scaled(rows)
            hidden = self.augment.hidden(rows)
        x: Tensor | None = None
        for name, part in zip(self.names, self.parts, strict=True):
            vectors = part(replace(rows, hidden=hidden[name]) if name in hidden else rows)
            x = vectors if x is None else x + vectors
        assert x is not None
        if self.bias is not None:
            x = x + self.bias
        for block in self.blocks:
            x = block(x)
        if rows.generator is not None and self.dropout > 0:
            dropout = self.dropout * rows.share
            x = x * (rows.uniform(x.shape[1]) >= dropout) / (1 - dropout)
        return x if self.augment is None else self.augment.blurred(x, rows)


def _first_temperature(loss: LossSettings, num_items: int) -> float:
    if loss.temperature == "auto":
        return automatic_temperature(num_items)
    return loss.initial_temperature if loss.temperature == "learned" else loss.temperature


class TwoTower(nn.Module):
    """A user tower and an item tower with their temperature.

    Args:
        user_tower, item_tower: modules from ``Rows`` to float32 [M, D].
        num_users, num_items: entities; user rows beyond are unknown users.
        similarity: ``cosine`` normalises both sides, ``dot`` leaves them, ``euclidean`` lifts them
            by two coordinates (``similarity``).
        item_bias: float32 [num_items], added to each item's scores where they are served
            (``all_vectors``), and nowhere else.
    """

    item_bias: Tensor | None

    def __init__(
        self,
        user_tower: nn.Module,
        item_tower: nn.Module,
        *,
        num_users: int,
        num_items: int,
        similarity: str,
        loss: LossSettings,
        item_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.user_tower, self.item_tower = user_tower, item_tower
        self.num_users, self.num_items = num_users, num_items
        self.similarity = similarity
        self.register_buffer("item_bias", item_bias, persistent=False)
        divided = loss.kind in WITH_TEMPERATURE
        learned = loss.temperature == "learned" and divided
        start = _first_temperature(loss, num_items)
        # Of a loss that divides by none it says that, and is no weight that nothing would move.
        start = start if divided else 1.0
        self.log_temperature = nn.Parameter(torch.tensor(math.log(start)), requires_grad=learned)
        self.bounds = (
            (math.log(loss.min_temperature), math.log(loss.max_temperature))
            if learned
            else (-math.inf, math.inf)
        )

    def temperature(self) -> Tensor:
        """Scalar that divides scores, clamped when it is learned."""
        return self.log_temperature.clamp(*self.bounds).exp()

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Bring a learned temperature back to its bounds; beyond them it has no gradient."""
        if self.log_temperature.requires_grad:
            self.log_temperature.clamp_(*self.bounds)

    @property
    def num_lifted(self) -> int:
        """By how many coordinates embeddings exceed the towers' dimension D."""
        return LIFTED[self.similarity]

    @property
    def num_served_beside(self) -> int:
        """The same of ``all_vectors``: those, and one for a bias of items."""
        return self.num_lifted + (self.item_bias is not None)

    def embed_users(self, rows: Rows) -> Tensor:
        """float32 [M, D + num_lifted], to multiply with items; unit length under cosine."""
        return as_queries(self.user_tower(rows), self.similarity)

    def embed_items(self, rows: Rows) -> Tensor:
        """float32 [M, D + num_lifted], to multiply with users; unit length under cosine."""
        return as_candidates(self.item_tower(rows), self.similarity)

    def tables(self) -> dict[str, Table]:
        """Every embedding table once, by its first name in the module tree."""
        return {name: part for name, part in self.named_modules() if isinstance(part, Table)}

    def weights(self) -> dict[str, Tensor]:
        """What is saved and each rank has whole."""
        return saved_weights(self)

    def shards(self) -> dict[str, RowShard]:
        """What is saved and split over ranks, named as ``weights`` names whole tables."""
        return {
            f"{name}.weight": table.rows
            for name, table in self.tables().items()
            if isinstance(table, ShardedTable)
        }

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Everything trained that is no table."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def all_vectors(self, cutoff: int | None, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
        """Vectors of all entities as they stand at the cut-off, in evaluation mode.

        Their dot product is the score that is served: that of training, and the item's bias.

        Args:
            ranks: who share the work, all of which call this and get the same bits as one alone.

        Returns:
            users float32 [num_users + 1, D + num_served_beside], whose last row serves unknown
            users, and items float32 [num_items, as many]; on the CPU if a table is sharded.
        """
        users, items = self.all_embeddings(cutoff, ranks)
        if self.item_bias is None:
            return users, items
        return with_bias(users, items, self.item_bias.to(items.device))

    @torch.no_grad()
    def all_embeddings(self, cutoff: int | None, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
        """As ``all_vectors`` without the bias: their dot product is the score of training.

        Returns:
            users float32 [num_users + 1, D + num_lifted], items float32 [num_items, as many].
        """
        users = self._every(self.embed_users, self.num_users + 1, cutoff, ranks)
        return users, self._every(self.embed_items, self.num_items, cutoff, ranks)

    def _every(
        self, embed: Callable[[Rows], Tensor], count: int, cutoff: int | None, ranks: Ranks
    ) -> Tensor:
        was_training = self.training
        self.eval()
        device = self.log_temperature.device
        # Tables that outgrow the device have vectors that do, and all ranks look up together.
        kept_on, sharing = ("cpu", ALONE) if self.shards() else (device, ranks)
        at = None if cutoff is None else torch.tensor(cutoff, device=device)
        chunks = torch.split(torch.arange(count, device=device), _CHUNK)
        first, last = sharing.part(len(chunks))
        # What has no rows knows its width only by asking for none.
        own = chunks[first:last] or (chunks[0][:0],)
        vectors = torch.cat([embed(Rows(chunk, at)).float().to(kept_on) for chunk in own])
        self.train(was_training)
        lengths, numbers = [len(chunk) for chunk in chunks], sharing.counts(len(chunks))
        ends = itertools.accumulate(numbers)
        counts = [sum(lengths[end - n : end]) for end, n in zip(ends, numbers, strict=True)]
        return sharing.gather(vectors, counts, "vectors of all entities")


def saved_weights(module: nn.Module) -> dict[str, Tensor]:
    """Each parameter and persistent buffer once, however shared."""
    saved = module.state_dict(keep_vars=True).keys()
    buffers = {name: value for name, value in module.named_buffers() if name in saved}
    return {**dict(module.named_parameters()), **buffers}
