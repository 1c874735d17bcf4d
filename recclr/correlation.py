"""Quantiles and correlations of what is looked at: lengths, popularity, settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def points_of(values: Tensor, shares: Sequence[float]) -> list[float]:
    """Quantiles of float [n], n at least 1, interpolated as ``torch.quantile`` does.

    That function refuses what has more than 16 million values.

    Args:
        shares: from 0 for the smallest value to 1 for the largest.
    """
    ordered = values.sort().values
    places = [share * (len(values) - 1) for share in shares]
    low = ordered[[math.floor(place) for place in places]].double()
    high = ordered[[math.ceil(place) for place in places]].double()
    parts = torch.tensor(places, dtype=torch.float64, device=low.device) % 1
    found: list[float] = low.lerp(high, parts).tolist()
    return found


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of two vectors [n], in [-1, 1]; NaN where either does not vary, or n < 2."""
    centred = [each.double() - each.double().mean() for each in (x, y)]
    sizes = [each.norm() for each in centred]
    # Equal numbers are centred to what rounding leaves.
    noise = [1e-6 * each.double().norm() for each in (x, y)]
    if len(x) < 2 or any(bool(size <= least) for size, least in zip(sizes, noise, strict=True)):
        return float("nan")
    return float(((centred[0] @ centred[1]) / (sizes[0] * sizes[1])).clamp(-1, 1))


def spearman(x: Tensor, y: Tensor) -> float:
    """Correlation of the ranks of two vectors [n]; equal numbers share the mean of their ranks."""
    return pearson(ranks_of(x), ranks_of(y))


def ranks_of(x: Tensor) -> Tensor:
    """From 1 up, float64 [n]; equal numbers share the mean of theirs."""
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    middle: Tensor = (last - (counts - 1) / 2).double()
    return middle[inverse]
