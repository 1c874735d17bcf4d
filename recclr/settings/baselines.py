"""Which baselines a model is judged beside; standard library only, as ``settings`` says why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from recclr.strict import STRICT

BASELINE_NAMES = (
    "popularity",
    "recent_popularity",
    "item_knn",
    "recent_item_knn",
    "als",
    "bpr",
    "spectral",
    "ease",
    "content",
)


@dataclass(frozen=True, kw_only=True)
class BaselineSettings:
    """Rankers judged beside the model; their settings are chosen on validation."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    names: tuple[str, ...] = BASELINE_NAMES
    """Those that the data allow are run (recency needs timestamps, EASE at most
    ``ease_max_items``, content item features); what was left out is said."""
    budget: Literal["small", "full"] = "small"
    """How many settings of each are tried on validation."""
    ease_max_items: int = 20_000

    def __post_init__(self) -> None:
        if not 1 <= self.ease_max_items <= 200_000:
            raise ValueError(
                f"ease_max_items must be between 1 and 200000, found {self.ease_max_items!r}"
            )
        unknown = [name for name in self.names if name not in BASELINE_NAMES]
        if unknown:
            raise ValueError(
                f"unknown baselines {unknown}: choose from {', '.join(BASELINE_NAMES)}"
            )
