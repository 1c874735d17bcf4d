"""Both towers of a configuration, freshly initialised."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from recclr.augment import augmentation
from recclr.data.log import (
    CategoricalColumn,
    DenseColumn,
    EncodedLog,
    FeatureTable,
    Prepared,
    RaggedColumn,
)
from recclr.errors import ConfigError
from recclr.history import HistoryPart
from recclr.optim import Table
from recclr.order import generator as keyed_generator
from recclr.parts import BagPart, CategoryPart, DensePart, IdPart, StatisticsPart
from recclr.propagation import PropagationPart
from recclr.settings import (
    FeatureSettings,
    HistorySettings,
    LossSettings,
    ModelSettings,
    PropagationSettings,
    TowerSettings,
)
from recclr.sharded_tables import NewTable
from recclr.similarity import log_popularity
from recclr.statistics import TimeIndex
from recclr.towers import Tower, TwoTower


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
    return TwoTower(
        user_tower,
        item_tower,
        num_users=prepared.train.num_users,
        num_items=prepared.train.num_items,
        similarity=model.similarity,
        loss=loss,
        item_bias=served_bias(model, prepared.train),
    )


def served_bias(model: ModelSettings, log: EncodedLog) -> Tensor | None:
    """What is added to each item's scores where they are served, float32 [num_items], or None."""
    if not model.popularity_bias:
        return None
    return model.popularity_bias * log_popularity(log.item_counts())


def build_tower(
    side: str,
    settings: TowerSettings,
    prepared: Prepared,
    *,
    model: ModelSettings,
    seed: int,
    new_table: NewTable = Table,
) -> Tower:
    """One tower alone, ``item`` or ``user`` (without a history); as ``build_model`` otherwise."""
    features = prepared.items if side == "item" else prepared.users
    return _Builder(prepared, model, seed, new_table).tower(side, settings, features)


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
        self.id_tables: dict[str, Table] = {}
        self.num_rows = {"user": prepared.users.num_rows, "item": prepared.items.num_rows}
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
                parts["id"] = self.id_part(side, settings)
            for name, feature in settings.features.items():
                parts[f"features.{name}"] = self.feature_part(side, name, feature, features)
            if settings.history is not None:
                if side == "item":
                    raise ConfigError("item.history: only users have a history")
                parts["history"] = self.history_part(settings.history)
            if side == "item":
                self.item_parts = dict(parts)
            if settings.id.propagation is not None:
                parts["propagation"] = self.propagation_part(side, settings.id.propagation)
            if not parts:
                raise ConfigError(
                    f"the {side} tower has nothing to read: set {side}.id.enabled = true, or "
                    f"declare {side}.features" + (" or user.history" if side == "user" else "")
                )
            known = {f"features.{name}": column for name, column in features.columns.items()}
            columns = [known.get(name) for name in parts]
            return Tower(
                parts,
                self.dim,
                mlp=settings.mlp,
                dropout=settings.dropout,
                augment=augmentation(settings.augment, [*parts], columns),
            )

    def id_part(self, side: str, settings: TowerSettings) -> IdPart:
        counts = self.log.user_counts() if side == "user" else self.log.item_counts()
        first_seen = self.index(side).first_seen if settings.id.as_of else None
        # The id is the first part.
        hidden = settings.augment.hides(0, settings.part_names())
        return IdPart(
            self.id_table(side),
            counts > 0,
            dropout=settings.id.dropout,
            first_seen=first_seen,
            trains_unknown=settings.id.dropout > 0 or settings.id.as_of or hidden,
        )

    def id_table(self, side: str) -> Table:
        """Of a tower, made when it is first asked for; the other one may add up its rows."""
        if side not in self.id_tables:
            self.id_tables[side] = self.table(self.num_rows[side] + 1)
        return self.id_tables[side]

    def propagation_part(self, side: str, settings: PropagationSettings) -> PropagationPart:
        """The graph is that of all train, whatever the moment a row is seen at."""
        items, users = self.log.known_pairs()
        own, others = (items, users) if side == "user" else (users, items)
        other = "item" if side == "user" else "user"
        return PropagationPart(
            self.id_table(other),
            own,
            others.lengths(),
            weight=settings.weight,
            most=settings.max_neighbours,
        )

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
        if history.reorder > 0 and index is None:
            raise ConfigError(
                "user.history.reorder: needs timestamps, and the log has none: all items of a "
                "history weigh the same in any order; leave it out"
            )
        return HistoryPart(
            parts,
            self.log.user_items(),
            index,
            dim=self.dim,
            length=history.length,
            half_life_d=history.half_life_d,
            dropout=history.dropout,
            crop=history.crop,
            mask=history.mask,
            reorder=history.reorder,
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
                swap=feature.swap,
            )
        column = features.columns[name]
        if isinstance(column, DenseColumn):
            return DensePart(
                column.values,
                self.dim,
                dropout=feature.dropout,
                swap=feature.swap,
                jitter=feature.jitter,
            )
        # One more row than categories: the last one stands for an empty list. A single category
        # never asks for it, but may share the table with a list.
        table = self.table(column.cardinality + 1, feature.shared)
        if isinstance(column, RaggedColumn):
            return BagPart(
                table,
                column,
                dropout=feature.dropout,
                swap=feature.swap,
                subsample=feature.subsample,
            )
        assert isinstance(column, CategoricalColumn)
        return CategoryPart(table, column, dropout=feature.dropout, swap=feature.swap)
