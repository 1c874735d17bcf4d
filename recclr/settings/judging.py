"""How rankings are judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from recclr.strict import STRICT
from recclr.strict import require_ranges as _check

Slice = Literal[
    "all",
    "warm_items",
    "cold_items",
    "cold_items_among_cold",
    "warm_users",
    "cold_users",
    "head",
    "torso",
    "tail",
]
SLICES: tuple[str, ...] = get_args(Slice)
METRIC_NAMES = ("recall", "capped_recall", "hit_rate", "ndcg", "mrr", "map", "precision")


def leading_slice(counts: Mapping[str, Any], wanted: str) -> str:
    """The slice whose figures come first: that which selects, or "all" where nobody is in it.

    Args:
        counts: by slice, of one split, as metrics.json has them.
    """
    return wanted if wanted in counts else "all"


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """How rankings are judged."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    ks: tuple[int, ...] = (5, 10, 20, 50)
    select: str = "recall@20"
    """Metric on validation that picks the checkpoint, and the settings of the baselines."""
    select_slice: Slice = "all"
    """Whose figure it is: everybody's, or that of one slice of users or items."""
    keep_seen: bool = False
    """Rank items the user already has as well (repeat purchases)."""
    num_bootstrap: int = 1000
    """Resamples of users behind each interval; 0 for none."""

    def __post_init__(self) -> None:
        _check(self, num_bootstrap=(0, 1_000_000))
        if self.num_bootstrap == 1:
            raise ValueError("num_bootstrap = 1 gives no interval: 0 for none, or 2 and more")
        if not self.ks or any(not 1 <= k <= 100_000 for k in self.ks):
            raise ValueError(f"ks must be cut-offs between 1 and 100000, found {list(self.ks)}")
        name, _, cutoff = self.select.partition("@")
        if cutoff not in map(str, self.ks):
            raise ValueError(f"select = {self.select!r} must name one of ks = {list(self.ks)}")
        if name not in METRIC_NAMES:
            raise ValueError(f"select = {self.select!r}: choose one of {', '.join(METRIC_NAMES)}")
