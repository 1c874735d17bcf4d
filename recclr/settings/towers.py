"""Features, ids, histories, and the towers they make."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

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
    """A category seen fewer times in train is treated as unknown."""
    transform: Literal["standardize", "quantile"] = "standardize"
    """How ``numeric`` values are scaled."""
    windows_d: tuple[float, ...] = (7.0, 30.0)
    """``statistics``: trailing windows in days."""
    age: bool = True
    """``statistics``: add age and time since last seen."""
    shared: str | None = None
    """Name of an embedding table that several features, also of the other tower, use together."""

    def __post_init__(self) -> None:
        _check(self, dropout=(0.0, 0.95), buckets=(2, 1 << 26), min_count=(1, 1 << 31))
        if self.kind == "text" and self.buckets is None:
            raise ValueError("a text feature needs 'buckets', for example buckets = 20000")
        if any(not (math.isfinite(w) and w > 0) for w in self.windows_d):
            raise ValueError(f"windows_d must be positive days, found {list(self.windows_d)}")
        if self.kind == "statistics" and not (self.windows_d or self.age):
            raise ValueError("a statistics feature needs windows_d, or age = true")


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

    def __post_init__(self) -> None:
        _check(self, dropout=(0.0, 0.95))


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

    def __post_init__(self) -> None:
        _check(self, length=(1, 100_000), half_life_d=(1e-6, 1e6), dropout=(0.0, 0.95))


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

    def __post_init__(self) -> None:
        _check(self, dropout=(0.0, 0.95))
        if any(not 1 <= width <= 65_536 for width in self.mlp):
            raise ValueError(f"mlp widths must be between 1 and 65536, found {list(self.mlp)}")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What both towers share."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    embedding_dim: int = 64
    similarity: Literal["cosine", "dot", "euclidean"] = "cosine"
    """``euclidean``: minus the squared distance, as a dot product of two more coordinates."""
    popularity_bias: float = 0.0
    """Times the log of an item's share of train: added to its scores where they are served, by one
    more coordinate, and not in training. In units of scores: after a training whose log_q was not
    corrected, the temperature undoes that."""
    init_std: float = 1.0
    """Standard deviation of a freshly drawn embedding row, as a multiple of embedding_dim^-1/2."""
    init: Literal["random", "spectral"] = "random"
    """Where id tables start: drawn, or from the truncated SVD of the normalised log, which takes
    seconds and saves epochs."""

    def __post_init__(self) -> None:
        _check(
            self,
            embedding_dim=(1, 8192),
            init_std=(1e-6, 100.0),
            popularity_bias=(-100.0, 100.0),
        )
