"""The loss and the negatives it is computed against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from recclr.settings.mining import ExplicitSettings, MinedSettings
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
class NegativesSettings:
    """Sources of negatives, under one log_q: shared by all rows of a batch, but for the last two,
    which each row has for itself.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    in_batch: bool = True
    uniform: int = 1024
    popularity: PopularitySettings | None = None
    mined: MinedSettings | None = None
    explicit: ExplicitSettings | None = None

    def __post_init__(self) -> None:
        _check(self, uniform=(0, 1 << 24))
        if not self.in_batch and self.uniform == 0 and self.popularity is None:
            raise ValueError("no source of negatives is left: set in_batch, uniform or popularity")


def clash_of(loss: LossSettings, negatives: NegativesSettings) -> str | None:
    """What in these two cannot go together, in words; None for nothing."""
    if negatives.mined is not None and loss.kind == "full_softmax":
        return (
            "negatives.mined: loss.kind = 'full_softmax' scores every item for every row, to which "
            "mined negatives add nothing; leave negatives.mined out, or set loss.kind = 'infonce'"
        )
    return None
