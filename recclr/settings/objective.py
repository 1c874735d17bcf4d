"""The loss and the negatives it is computed against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from recclr.strict import STRICT
from recclr.strict import require_ranges as _check


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The objective."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    kind: Literal["infonce", "full_softmax"] = "infonce"
    temperature: float | Literal["learned"] = "learned"
    initial_temperature: float = 0.1
    min_temperature: float = 0.02
    max_temperature: float = 1.0
    second_temperature: float | None = None
    """BSL: exponent on the summed negatives; None for plain InfoNCE."""
    log_q_strength: float = 1.0
    """1 corrects the sampling bias in full, 0 not at all."""
    mask_known_positives: bool = True

    def __post_init__(self) -> None:
        _check(
            self,
            temperature=(1e-4, 1e4),
            initial_temperature=(1e-4, 1e4),
            min_temperature=(1e-4, 1e4),
            max_temperature=(1e-4, 1e4),
            second_temperature=(0.01, 100.0),
            log_q_strength=(0.0, 1.0),
        )
        if self.min_temperature > self.max_temperature:
            raise ValueError("min_temperature is above max_temperature")


@dataclass(frozen=True, kw_only=True)
class PopularitySettings:
    """Negatives drawn in proportion to train count ** alpha."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    count: int
    alpha: float = 0.75

    def __post_init__(self) -> None:
        _check(self, count=(1, 1 << 24), alpha=(0.0, 2.0))


@dataclass(frozen=True, kw_only=True)
class QueueSettings:
    """Positives of earlier steps as further negatives, without gradient (``momentum``)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    size: int = 4096
    """Vectors that are kept; the oldest go first. 0 for no queue."""
    momentum: float = 0.999
    """What is left of the old weights at each step of the average of the item tower that embeds
    them; 0 for the tower itself."""
    warmup: float = 0.05
    """Share of all steps in which the queue fills but is nobody's negative yet."""

    def __post_init__(self) -> None:
        _check(self, size=(0, 1 << 24), momentum=(0.0, 0.999999), warmup=(0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class NegativesSettings:
    """Sources of negatives, shared by all rows of a batch, under one log_q."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    in_batch: bool = True
    uniform: int = 1024
    popularity: PopularitySettings | None = None
    queue: QueueSettings | None = None
    available: bool = False
    """Only items with a train event before the moment of the step; trains on time cells."""
    within: str | None = None
    """Categorical item feature: negatives are of the positive's own category. A positive without
    one meets all."""
    counts: Literal["static", "streaming"] = "static"
    """How often an item is expected among the positives: counted in the log, or estimated from the
    batches so far (``streaming``)."""

    def __post_init__(self) -> None:
        _check(self, uniform=(0, 1 << 24))
        if self.counts == "streaming" and not (self.in_batch or self.queue):
            raise ValueError(
                "counts = 'streaming' is about positives that become negatives: set in_batch or "
                "queue, or leave counts out"
            )
        if not self.in_batch and self.uniform == 0 and self.popularity is None:
            raise ValueError("no source of negatives is left: set in_batch, uniform or popularity")
