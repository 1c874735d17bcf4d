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
    # The softmax family (``scoring``).
    log_q: Literal["corrected", "classic"] = "corrected"
    """The classic form corrects the logit of the positive as well, which no source drew."""
    decoupled: bool = False
    """DCL: the positive is left out of the denominator."""
    hardness: float = 0.0
    """Negatives are weighted by exp(hardness * logit), to a mean of 1; 0 for equal weights."""
    top_k: int | None = None
    """SL@K: a positive far below its row's top K items counts less; None for equal weights."""
    top_k_temperature: float = 1.0
    """Scores, not divided by the temperature, over which the weight of SL@K falls."""
    symmetric: float = 0.0
    """Share of the item -> user direction in the loss."""
    positives: int = 1
    """Items of its user that each row learns from: its own and others of train."""

    def __post_init__(self) -> None:
        _check(
            self,
            temperature=(1e-4, 1e4),
            initial_temperature=(1e-4, 1e4),
            min_temperature=(1e-4, 1e4),
            max_temperature=(1e-4, 1e4),
            second_temperature=(0.01, 100.0),
            log_q_strength=(0.0, 1.0),
            hardness=(0.0, 10.0),
            top_k=(1, 1 << 24),
            top_k_temperature=(1e-4, 1e4),
            symmetric=(0.0, 1.0),
            positives=(1, 64),
        )
        if self.min_temperature > self.max_temperature:
            raise ValueError("min_temperature is above max_temperature")
        self._check_softmax()

    @property
    def is_plain(self) -> bool:
        """Whether the loss is InfoNCE, whatever its candidates: log(alternatives) bounds it."""
        return (
            self.kind in ("infonce", "full_softmax")
            and self.log_q == "corrected"
            and self.second_temperature is None
            and not self.decoupled
            and self.hardness == 0
            and self.top_k is None
            and self.symmetric == 0
        )

    def _check_softmax(self) -> None:
        if self.decoupled and self.second_temperature is not None:
            raise ValueError(
                "decoupled is second_temperature = 1, and both are set; leave one of them out"
            )
        if self.log_q == "classic" and (self.decoupled or self.second_temperature is not None):
            raise ValueError(
                'log_q = "classic" corrects the positive in the denominator, where decoupled and '
                'second_temperature have none; set log_q = "corrected"'
            )
        if self.log_q == "classic" and self.kind == "full_softmax":
            raise ValueError(
                'log_q = "classic" corrects what is sampled, and kind = "full_softmax" samples '
                'nothing; set log_q = "corrected"'
            )
        if self.positives > 1 and not self.mask_known_positives:
            raise ValueError(
                f"positives = {self.positives} takes other train items of a user for positives, "
                "which must not be its negatives; set mask_known_positives = true"
            )


@dataclass(frozen=True, kw_only=True)
class PopularitySettings:
    """Negatives drawn in proportion to train count ** alpha."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    count: int
    alpha: float = 0.75

    def __post_init__(self) -> None:
        _check(self, count=(1, 1 << 24), alpha=(0.0, 2.0))


@dataclass(frozen=True, kw_only=True)
class NegativesSettings:
    """Sources of negatives, shared by all rows of a batch, under one log_q."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    in_batch: bool = True
    uniform: int = 1024
    popularity: PopularitySettings | None = None

    def __post_init__(self) -> None:
        _check(self, uniform=(0, 1 << 24))
        if not self.in_batch and self.uniform == 0 and self.popularity is None:
            raise ValueError("no source of negatives is left: set in_batch, uniform or popularity")
