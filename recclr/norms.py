"""How long vectors are, and how much of a ranking popularity makes.

Shape letters: M vectors, D dimension, V items, Q queries, K cut-off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recclr.similarity import log_popularity


@dataclass(frozen=True)
class Norms:
    """Lengths of vectors: the smallest, the three quartiles, the largest; NaN for no vectors."""

    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float


@dataclass(frozen=True)
class NormReport:
    """Lengths on both sides, and what they and the rankings have to do with popularity.

    Attributes:
        users, items: lengths.
        pearson: correlation of an item's length with the log of its popularity. spearman: of their
            ranks. Both in [-1, 1]; NaN where either side does not vary, as lengths under cosine.
        head_share: see ``head_share``.
    """

    users: Norms
    items: Norms
    pearson: float
    spearman: float
    head_share: float


def norm_report(
    user_vectors: Tensor, item_vectors: Tensor, counts: Tensor, ranked: Tensor
) -> NormReport:
    """All of it at once.

    Args:
        user_vectors: float [M, D], item_vectors: float [V, D]: what the towers give; without the
            coordinates that ``similarity`` adds, which are no part of a length.
        counts: int64 [V], interactions of each item in train.
        ranked: int64 [Q, K] item indices of top-k lists, -1 for an empty place.
    """
    lengths, popularity = item_vectors.double().norm(dim=1), log_popularity(counts)
    correlation = pearson(lengths, popularity)
    # Lengths that differ by rounding alone have ranks all the same.
    by_rank = correlation if math.isnan(correlation) else spearman(lengths, popularity)
    return NormReport(
        norms_of(user_vectors),
        norms_of(item_vectors),
        correlation,
        by_rank,
        head_share(ranked, counts),
    )


def norms_of(vectors: Tensor) -> Norms:
    """Five points of the distribution of Euclidean lengths, between neighbours linearly.

    Args:
        vectors: float [M, D]. M may be 0.
    """
    if not len(vectors):
        return Norms(*[float("nan")] * 5)
    return Norms(*points_of(vectors.double().norm(dim=1), (0.0, 0.25, 0.5, 0.75, 1.0)))


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


def head_share(ranked: Tensor, counts: Tensor, *, share: float = 0.01) -> float:
    """Share of the places of top-k lists that the most popular items take, in [0, 1].

    Args:
        ranked: int64 [Q, K] item indices; -1 for a place that stayed empty, which does not count.
        counts: int64 [V], interactions of each item in train.
        share: which part of the catalogue is the head: so many of the items, rounded up, ties by
            item index.

    Returns:
        NaN where all places are empty.
    """
    # 700 hundredths are 7.000000000000001.
    size = math.ceil(round(len(counts) * share, 6))
    head = torch.zeros(len(counts), dtype=torch.bool, device=counts.device)
    head[counts.argsort(descending=True, stable=True)[:size]] = True
    filled = ranked[ranked >= 0]
    return float(head[filled].double().mean())


def ranks_of(x: Tensor) -> Tensor:
    """From 1 up, float64 [n]; equal numbers share the mean of theirs."""
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    middle: Tensor = (last - (counts - 1) / 2).double()
    return middle[inverse]
