"""Hard negatives: which of the best-ranked items of a user are taken, and when anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from recclr.strict import STRICT
from recclr.strict import require_ranges as _check


@dataclass(frozen=True, kw_only=True)
class MiningSettings:
    """Which items that a model ranks high for a user, and that the user does not have, are taken.

    An item is refused by the first guard that it fails, in the order of the fields. p is the score
    of the positive, n that of the item. With cosine similarity scores lie in [-1, 1]; those of dot
    products have the scale of the model, and so has ``margin``.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    count: int = 4
    """Items taken for each positive."""
    depth: int = 100
    """Ranks that are looked at, known positives left out before."""
    skip: int = 10
    """Best ranks that are left out: the likeliest to be positives that nobody has seen yet."""
    drop_popular: float = 0.0
    """Share of the items, the most popular in train first, that are never taken."""
    max_train_rows: int = 0
    """Items with more train rows than this are never taken; 0 for no bound."""
    margin: float = 0.0
    """p - n is at least this; below 0, an item may score above the positive by as much."""
    relative_margin: float = 0.0
    """p - n is at least this times |p|, whatever the sign of p; 0 for no such bound."""
    share: float = 0.95
    """n is below this times p where p is above 0 (a share of less says nothing, and ``margin``
    alone decides there); 0 for no such bound."""
    choice: Literal["uniform", "score", "top"] = "uniform"
    """Among what is left: each alike; in proportion to exp(score / temperature), without
    replacement; or the best."""

    def __post_init__(self) -> None:
        _check(
            self,
            count=(1, 1 << 10),
            depth=(1, 100_000),
            skip=(0, 99_999),
            drop_popular=(0.0, 0.999),
            max_train_rows=(0, 1 << 40),
            margin=(-1e6, 1e6),
            relative_margin=(0.0, 1e3),
            share=(0.0, 1.0),
        )
        if self.choice not in ("uniform", "score", "top"):
            raise ValueError(f"choice must be uniform, score or top, found {self.choice!r}")
        if self.depth - self.skip < self.count:
            raise ValueError(
                f"depth - skip must leave at least count = {self.count} ranks, found "
                f"depth = {self.depth} and skip = {self.skip}; raise depth or lower the others"
            )


@dataclass(frozen=True, kw_only=True)
class MinedSettings(MiningSettings):
    """Hard negatives from the model in training, by user, mined anew as it changes.

    p is one score for all positives of a user, see ``positive``.
    """

    pool: int = 50
    """Items kept for each user until the next mining; each step draws ``count`` for each row."""
    positive: Literal["mean", "lowest"] = "mean"
    """What stands for the score of the positive: the mean over the user's train items, or the
    lowest of them, which refuses far more."""
    warmup_epochs: float = 2.0
    """Epochs before the first mining; what an untrained model ranks high is no hard negative."""
    refresh_epochs: float = 2.0
    """Epochs from one mining to the next."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            self,
            pool=(1, 1 << 16),
            warmup_epochs=(0.0, 1e6),
            refresh_epochs=(0.001, 1e6),
        )
        if self.pool < self.count:
            raise ValueError(f"pool must be at least count = {self.count}, found {self.pool}")

    @property
    def width(self) -> int:
        """Most items that can be kept for a user."""
        return min(self.pool, self.depth - self.skip)


@dataclass(frozen=True, kw_only=True)
class ExplicitSettings:
    """What users were shown and did not take, or refused: negatives of their user alone."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    events: tuple[str, ...]
    """Event types (``data.columns.event``) that are negatives, such as "dislike"."""
    count: int = 2
    """Drawn for each row and step, from the list of its user."""
    weight: float = 1.0
    """Each item of the list counts so many times more in the denominator, beside the once that
    every item counts."""

    def __post_init__(self) -> None:
        _check(self, count=(1, 1 << 10), weight=(1e-4, 1e4))
        if not self.events:
            raise ValueError("explicit.events names no event type; name one, or leave explicit out")
