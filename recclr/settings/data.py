"""Which rows are read, and how they are split."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from recclr.strict import STRICT
from recclr.strict import require_ranges as _check


@dataclass(frozen=True, kw_only=True)
class ColumnSettings:
    """Names of the columns that carry the log; ``user`` and ``item`` also key the tables."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str | None = "timestamp"
    """None (in TOML ""), or absent in the data: a log without time."""
    event: str | None = None
    """Column of the event type, needed for ``event_weights``."""
    weight: str | None = None
    """Column of a positive weight per row."""

    def __post_init__(self) -> None:
        if self.timestamp == "":
            object.__setattr__(self, "timestamp", None)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the tables are and which of their rows count. Steps run in the order of the fields."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    events: str
    """File, folder of shards or glob; Parquet, CSV or JSONL. ``${NAME}`` is an environment
    variable."""
    users: str | None = None
    items: str | None = None
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    id_type: Literal["auto", "string"] = "auto"
    """``string`` keeps "0012" and "12" apart in CSV."""
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What happens to null ids, NaN and impossible times; dropped rows go to the quarantine."""
    max_bad_share: float = 0.001
    """With ``drop``: refuse all the same above this share of bad rows."""
    where: dict[str, str] = field(default_factory=dict)
    """Column -> condition, for example ``rating = ">= 7"`` (a rating threshold) or
    ``is_product_code = "== true"``; columns of the item and user tables may be named as well."""
    event_weights: dict[str, float] = field(default_factory=dict)
    """Event type -> weight; types not named are dropped."""
    deduplicate: Literal["first", "last", "sum", "none"] = "first"
    """One row per (user, item): the first or last in time, or the sum of weights at the last."""
    k_core_user: int = 0
    k_core_item: int = 0
    """Keep users / items with at least so many rows, repeated until stable; 0 keeps all."""
    max_per_user: int | None = None
    """Keep the most recent rows of each user."""
    decay_half_life_d: float | None = None
    """Weight of a train row halves every so many days before the last train row."""
    resident: bool | Literal["auto"] = "auto"
    """Read, split and train with rows in memory, or (false) in files in the run folder that are
    removed at the end, from Parquet piece by piece; ``auto``: in files if memory would be short.
    The result is the same."""

    def __post_init__(self) -> None:
        _check(
            self,
            max_bad_share=(0.0, 1.0),
            k_core_user=(0, 1 << 31),
            k_core_item=(0, 1 << 31),
            max_per_user=(1, 1 << 31),
            decay_half_life_d=(1e-6, 1e6),
        )
        for name, weight in self.event_weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"event_weights.{name} must be above 0, found {weight!r}")


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """How validation and test are held out."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    by: Literal["auto", "time", "given", "leave_last", "random", "items"] = "auto"
    """``auto``: by global time where there is a timestamp, else random per user. ``items``: all
    rows of a share of the items, which judges how items that nobody has had yet are ranked."""
    valid: float = 0.1
    """Share of rows (``leave_last``: number of rows per user, a whole number of at least 1;
    ``items``: share of the items)."""
    test: float = 0.1
    """As ``valid``; 0 for none."""
    valid_events: str | None = None
    """``given``: file(s) of validation rows; without it, ``valid`` of train is cut per user at
    random (or by time where there is one)."""
    test_events: str | None = None
    train_share: float = 1.0
    """Learn from a sample of the train rows: so large a share of each user's, one at least. What is
    held out, and what users already have, stays that of the whole; smaller shares of a seed are
    parts of larger ones."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, valid=(0.0, 1e6), test=(0.0, 1e6), train_share=(1e-6, 1.0), seed=(0, 1 << 62))
        if self.by in ("auto", "time", "random", "items") and not self.valid + self.test < 1:
            raise ValueError(f"valid + test must leave rows for train: {self.valid} + {self.test}")
        if self.by == "given" and self.test_events is None:
            raise ValueError("split.by = 'given' needs split.test_events")
