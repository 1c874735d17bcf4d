"""Features, ids, histories, and the towers they make."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from recclr.settings.augment import AugmentSettings
from recclr.strict import STRICT
from recclr.strict import require_ranges as _check

FeatureKind = Literal["categorical", "multi_hot", "numeric", "vector", "text", "statistics"]


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """One feature column of a user or an item table."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    kind: FeatureKind
    column: str | None = None
    """Column of the table; the feature's own name where not given."""
    dropout: float = 0.0
    """Probability that training replaces the whole feature by its learned "missing" vector."""
    buckets: int | None = None
    """Hash into this many buckets instead of a vocabulary (required for ``text``)."""
    min_count: int = 1
    """A category, or term of a ``text``, of fewer rows of train is treated as unknown. Rare terms
    are ids in disguise: what a model puts on them is of no use to new items."""
    transform: Literal["standardize", "quantile"] = "standardize"
    """How ``numeric`` values are scaled."""
    windows_d: tuple[float, ...] = (7.0, 30.0)
    """``statistics``: trailing windows in days."""
    age: bool = True
    """``statistics``: add age and time since last seen."""
    shared: str | None = None
    """Name of an embedding table that several features, also of the other tower, use together."""
    subsample: float = 1.0
    """``multi_hot``, ``text``: training keeps each category of a row with this probability, and
    always at least one."""
    jitter: float = 0.0
    """``numeric``: standard deviation of the noise that training adds to the scaled value."""
    swap: float = 0.0
    """Probability that training shows the feature of another row of the step, drawn at random."""

    def __post_init__(self) -> None:
        _check(self, dropout=(0.0, 0.95), buckets=(2, 1 << 26), min_count=(1, 1 << 31))
        _check(self, subsample=(0.05, 1.0), jitter=(0.0, 10.0), swap=(0.0, 0.95))
        if self.subsample < 1.0 and self.kind not in ("multi_hot", "text"):
            raise ValueError(
                "subsample is for lists of categories (multi_hot, text), found kind = "
                f"{self.kind!r}; leave it out"
            )
        if self.jitter > 0.0 and self.kind != "numeric":
            raise ValueError(
                f"jitter is for scaled numbers, found kind = {self.kind!r}; leave it out"
            )
        if self.kind == "text" and self.buckets is None:
            raise ValueError("a text feature needs 'buckets', for example buckets = 20000")
        if any(not (math.isfinite(w) and w > 0) for w in self.windows_d):
            raise ValueError(f"windows_d must be positive days, found {list(self.windows_d)}")
        if self.kind == "statistics" and not (self.windows_d or self.age):
            raise ValueError("a statistics feature needs windows_d, or age = true")


@dataclass(frozen=True, kw_only=True)
class PropagationSettings:
    """An id together with those it stands beside in train: a user's items, an item's users."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    weight: float = 1.0
    """Of the sum beside the id itself."""
    max_neighbours: int = 100
    """So many that training adds up for a row, drawn anew in each step; all count when served."""

    def __post_init__(self) -> None:
        _check(self, weight=(1e-6, 1e3), max_neighbours=(1, 1 << 20))


@dataclass(frozen=True, kw_only=True)
class IdSettings:
    """The id embedding of a tower."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    enabled: bool = True
    dropout: float = 0.0
    """Probability that training replaces an id by the unknown id, which trains the vector that
    unknown ids get."""
    as_of: bool = False
    """Use an item's id only where the item had been seen before the moment of the event, so that
    new items look in training as they will at evaluation. Needs timestamps."""
    propagation: PropagationSettings | None = None
    """One step of light graph convolution over train, of the ids of the other side."""

    def __post_init__(self) -> None:
        _check(self, dropout=(0.0, 0.95))
        if self.propagation is not None and not self.enabled:
            raise ValueError("propagation adds to an id, which is not enabled; leave it out")


@dataclass(frozen=True, kw_only=True)
class HistorySettings:
    """The user's past items as a query feature, pooled with recency weights."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    length: int = 50
    """At most this many most recent items."""
    half_life_d: float | None = None
    """Weight of an item halves every so many days; None pools all equally."""
    dropout: float = 0.0
    """Probability that training drops the whole history of a row."""
    use: Literal["ids", "features", "both"] = "ids"
    """What represents an item of the history: the item tower's id table, its features (all but
    statistics), or their sum. Features make a history of rare or new items speak."""
    crop: float = 1.0
    """Training keeps this share of a history, rounded up: a stretch that begins anywhere."""
    mask: float = 0.0
    """Probability that training leaves out an item of a history."""
    reorder: float = 0.0
    """Share of a history, rounded down, in which training shuffles who is how recent: a stretch
    that begins anywhere, as crop, mask and reorder of Xie et al. 2022 (CL4SRec)."""

    def __post_init__(self) -> None:
        _check(self, length=(1, 100_000), half_life_d=(1e-6, 1e6), dropout=(0.0, 0.95))
        _check(self, crop=(0.05, 1.0), mask=(0.0, 0.95), reorder=(0.0, 1.0))
        if self.reorder > 0.0 and self.half_life_d is None:
            raise ValueError(
                f"reorder = {self.reorder:g} has no effect without half_life_d: all items of the "
                "history weigh the same in any order; set history.half_life_d, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class TowerSettings:
    """One tower: id, features, history (users only), and what is done with their sum."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    id: IdSettings = field(default_factory=IdSettings)
    features: dict[str, FeatureSettings] = field(default_factory=dict)
    history: HistorySettings | None = None
    mlp: tuple[int, ...] = ()
    """Hidden widths of the residual MLP blocks; empty for none."""
    dropout: float = 0.0
    """Dropout on the coordinates of the summed embedding, before normalisation."""
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    """What training hides together, blurs, and how all rates change while it goes on."""

    def __post_init__(self) -> None:
        _check(self, dropout=(0.0, 0.95))
        self.augment.units(self.part_names())
        if any(not 1 <= width <= 65_536 for width in self.mlp):
            raise ValueError(f"mlp widths must be between 1 and 65536, found {list(self.mlp)}")

    def part_names(self) -> tuple[str, ...]:
        """What the tower adds up, in order: "id", "features.<name>", "history",
        "propagation".
        """
        return (
            *(("id",) if self.id.enabled else ()),
            *(f"features.{name}" for name in self.features),
            *(("history",) if self.history is not None else ()),
            *(("propagation",) if self.id.propagation is not None else ()),
        )


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Which items of a user make a pair, and how a user is served, under ``item_item``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    window: int = 5
    """Items at most so many places apart in a user's history are a pair."""
    within_d: float | None = None
    """And at most so many days apart; None for any."""
    half_life: float = 2.0
    """The weight of a pair halves with every so many places of distance."""
    query_length: int = 20
    """A user is the mean of at most so many last items."""

    def __post_init__(self) -> None:
        _check(
            self,
            window=(1, 1000),
            within_d=(1e-6, 1e6),
            half_life=(1e-3, 1e6),
            query_length=(1, 100_000),
        )


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What both towers share."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    mode: Literal["user_item", "item_item"] = "user_item"
    """``item_item``: one tower for both sides learns which items people have close together; users
    are served by the mean of their last items."""
    pairs: PairSettings = field(default_factory=PairSettings)
    """For ``item_item``."""
    embedding_dim: int = 64
    similarity: Literal["cosine", "dot", "euclidean"] = "cosine"
    """``euclidean``: minus the squared distance, as a dot product of two more coordinates."""
    popularity_bias: float = 0.0
    """Times the log of an item's share of train: added to its scores where they are served, by one
    more coordinate, and not in training. In units of scores: after a training whose log_q was not
    corrected, the temperature undoes that."""
    init_std: float = 1.0
    """Standard deviation of a freshly drawn embedding row, as a multiple of embedding_dim^-1/2."""
    init: Literal["auto", "random", "spectral"] = "auto"
    """Where id tables start: drawn, or from the truncated SVD of the normalised log, which takes
    seconds and saves epochs. ``auto``: from the SVD where users and items both have an id, the log
    has at most 20 M rows, and the towers are not one (``item_item``)."""
    init_from: str | None = None
    """Folder that `recclr pretrain-items` wrote: where the item tower's features start."""

    def __post_init__(self) -> None:
        _check(
            self,
            embedding_dim=(1, 8192),
            init_std=(1e-6, 100.0),
            popularity_bias=(-100.0, 100.0),
        )
