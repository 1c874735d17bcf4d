"""What all settings share: no unknown key, no silent cast, no value outside its range."""

from __future__ import annotations

import math
from typing import Any

# pydantic reads this attribute from a standard dataclass: it refuses unknown keys and silent casts.
STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}


def require_ranges(settings: Any, **ranges: tuple[float, float]) -> None:
    """Refuse a value outside its closed range; None means "not set" and passes.

    Raises:
        ValueError: names the setting, its range and what was found.
    """
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if value is None or isinstance(value, (str, bool)):
            continue
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"{name} must be between {low} and {high}, found {value!r}")
