"""Two towers from a configuration, without model code.

A tower is the sum of its parts (``parts``), an optional residual MLP, and what its ``similarity``
makes of that. Any ``nn.Module`` that maps ``Rows`` to float32 [M, D] may take a tower's place.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from recclr.data.log import (
    CategoricalColumn,
    DenseColumn,
    FeatureTable,
    Prepared,
    RaggedColumn,
)
from recclr.errors import ConfigError
from recclr.optim import Table
from recclr.order import generator as keyed_generator
from recclr.parts import (
    BagPart,
    CategoryPart,
    DensePart,
    HistoryPart,
    IdPart,
    Rows,
    StatisticsPart,
)
from recclr.settings import (
    WITH_TEMPERATURE,
    FeatureSettings,
    HistorySettings,
    LossSettings,
    ModelSettings,
    TowerSettings,
)
from recclr.sharded_tables import NewTable, RowShard, ShardedTable
from recclr.similarity import LIFTED, as_candidates, as_queries, log_popularity, with_bias
from recclr.statistics import TimeIndex

_CHUNK = 16_384


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
    """

    def __init__(
        self, parts: dict[str, nn.Module], dim: int, *, mlp: tuple[int, ...], dropout: float
    ) -> None:
        super().__init__()
        if not parts:
            raise ConfigError("a tower needs an id, a feature or a history; all are switched off")
        # A feature may bear any name, and a module's key may not hold a dot.
        self.names = tuple(parts)
        self.parts = nn.ModuleList(parts.values())
        self.blocks = nn.ModuleList(ResidualBlock(dim, hidden) for hidden in mlp)
        self.dropout = dropout
        # Where every part is small this is what all entities share, popularity's direction.
        self.bias = None if tuple(parts) == ("id",) else nn.Parameter(torch.zeros(dim))

    def forward(self, rows: Rows) -> Tensor:
        """float32 [M, D], not normalised."""
        x: Tensor = self.parts[0](rows)
        for part in list(self.parts)[1:]:
            x = x + part(rows)
        if self.bias is not None:
            x = x + self.bias
        for block in self.blocks:
            x = block(x)
        if rows.generator is not None and self.dropout > 0:
            x = x * (rows.uniform(x.shape[1]) >= self.dropout) / (1 - self.dropout)
        return x


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
        start = loss.initial_temperature if isinstance(loss.temperature, str) else loss.temperature
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
        """What is saved and each rank has whole: each parameter and persistent buffer once, however
        shared.
        """
        saved = self.state_dict(keep_vars=True).keys()
        buffers = {name: value for name, value in self.named_buffers() if name in saved}
        return {**dict(self.named_parameters()), **buffers}

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
    def all_vectors(self, cutoff: int | None) -> tuple[Tensor, Tensor]:
        """Vectors of all entities as they stand at the cut-off, in evaluation mode.

        Their dot product is the score that is served: that of training, and the item's bias.

        Returns:
            users float32 [num_users + 1, D + num_served_beside], whose last row serves unknown
            users, and items float32 [num_items, as many]; on the CPU if a table is sharded.
        """
        was_training = self.training
        self.eval()
        device = self.log_temperature.device
        # Tables that outgrow the device have vectors that do.
        kept_on = "cpu" if self.shards() else device
        at = None if cutoff is None else torch.tensor(cutoff, device=device)

        def embed(tower: Callable[[Rows], Tensor], count: int) -> Tensor:
            chunks = torch.split(torch.arange(count, device=device), _CHUNK)
            parts = (tower(Rows(chunk, at)).float() for chunk in chunks)
            return torch.cat([part.to(kept_on) for part in parts])

        users = embed(self.embed_users, self.num_users + 1)
        items = embed(self.embed_items, self.num_items)
        self.train(was_training)
        if self.item_bias is not None:
            users, items = with_bias(users, items, self.item_bias.to(kept_on))
        return users, items


def build_model(
    prepared: Prepared,
    *,
    user: TowerSettings,
    item: TowerSettings,
    model: ModelSettings,
    loss: LossSettings,
    seed: int,
    new_table: NewTable = Table,
) -> TwoTower:
    """Both towers for the given data, freshly initialised on the CPU.

    Args:
        new_table: makes every embedding table; see ``sharded_tables.table_maker``.

    Raises:
        ConfigError: a feature needs timestamps that the log lacks, or a tower would be empty.
    """
    builder = _Builder(prepared, model, seed, new_table)
    item_tower = builder.tower("item", item, prepared.items)
    user_tower = builder.tower("user", user, prepared.users)
    bias = None
    if model.popularity_bias:
        bias = model.popularity_bias * log_popularity(prepared.train.item_counts())
    return TwoTower(
        user_tower,
        item_tower,
        num_users=prepared.train.num_users,
        num_items=prepared.train.num_items,
        similarity=model.similarity,
        loss=loss,
        item_bias=bias,
    )


class _Builder:
    """Tables and time indexes that parts of both towers share."""

    def __init__(
        self, prepared: Prepared, model: ModelSettings, seed: int, new_table: NewTable
    ) -> None:
        self.log, self.new_table = prepared.train, new_table
        self.dim = model.embedding_dim
        self.std = model.init_std / math.sqrt(model.embedding_dim)
        self.generator = keyed_generator("cpu", seed, 0x7AB1E)
        self.shared: dict[str, Table] = {}
        self.indexes: dict[str, TimeIndex] = {}
        self.item_parts: dict[str, nn.Module] = {}

    def table(self, num_rows: int, shared: str | None = None) -> Table:
        """A fresh table, or the one that bears the shared name."""
        if shared is not None and shared in self.shared:
            if self.shared[shared].num_rows != num_rows:
                raise ConfigError(
                    f"shared table {shared!r}: the features that share it differ in kind or "
                    f"buckets ({self.shared[shared].num_rows} and {num_rows} rows)"
                )
            return self.shared[shared]
        table = self.new_table(num_rows, self.dim, std=self.std, generator=self.generator)
        if shared is not None:
            self.shared[shared] = table
        return table

    def index(self, side: str) -> TimeIndex:
        if side not in self.indexes:
            of = TimeIndex.of_users if side == "user" else TimeIndex.of_items
            self.indexes[side] = of(self.log)
        return self.indexes[side]

    def tower(self, side: str, settings: TowerSettings, features: FeatureTable) -> Tower:
        # Layers draw from torch's global generator when they are made; fork it, seeded by ours.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=self.generator)))
            parts: dict[str, nn.Module] = {}
            if settings.id.enabled:
                parts["id"] = self.id_part(side, settings, features.num_rows)
            for name, feature in settings.features.items():
                parts[f"features.{name}"] = self.feature_part(side, name, feature, features)
            if settings.history is not None:
                if side == "item":
                    raise ConfigError("item.history: only users have a history")
                parts["history"] = self.history_part(settings.history)
            if side == "item":
                self.item_parts = parts
            return Tower(parts, self.dim, mlp=settings.mlp, dropout=settings.dropout)

    def id_part(self, side: str, settings: TowerSettings, num_rows: int) -> IdPart:
        counts = self.log.user_counts() if side == "user" else self.log.item_counts()
        first_seen = self.index(side).first_seen if settings.id.as_of else None
        table = self.table(num_rows + 1)
        return IdPart(table, counts > 0, dropout=settings.id.dropout, first_seen=first_seen)

    def history_part(self, history: HistorySettings) -> HistoryPart:
        """Pools the item tower's own parts, so that both towers learn one meaning of an item."""
        ids, features = history.use != "features", history.use != "ids"
        parts = [
            part
            for name, part in self.item_parts.items()
            if not isinstance(part, StatisticsPart) and (ids if name == "id" else features)
        ]
        if not parts:
            raise ConfigError(
                f"user.history.use = {history.use!r}: the item tower has no such part; "
                "enable item.id or add item.features"
            )
        index = self.index("user") if self.log.timestamp is not None else None
        return HistoryPart(
            parts,
            self.log.user_items(),
            index,
            dim=self.dim,
            length=history.length,
            half_life_d=history.half_life_d,
            dropout=history.dropout,
        )

    def feature_part(
        self, side: str, name: str, feature: FeatureSettings, features: FeatureTable
    ) -> nn.Module:
        if feature.kind == "statistics":
            return StatisticsPart(
                self.index(side),
                self.dim,
                windows_d=feature.windows_d,
                age=feature.age,
                dropout=feature.dropout,
            )
        column = features.columns[name]
        if isinstance(column, DenseColumn):
            return DensePart(column.values, self.dim, dropout=feature.dropout)
        # One more row than categories: the last one stands for an empty list. A single category
        # never asks for it, but may share the table with a list.
        table = self.table(column.cardinality + 1, feature.shared)
        if isinstance(column, RaggedColumn):
            return BagPart(table, column, dropout=feature.dropout)
        assert isinstance(column, CategoricalColumn)
        return CategoryPart(table, column, dropout=feature.dropout)
