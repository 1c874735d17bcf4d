"""Popularity, and what every other baseline falls back to where it knows nothing.

Shape letters: Q queries, V corpus, K cut-off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recclr.data.log import Csr, EncodedLog
from recclr.ranking import Ranker, TopK
from recclr.statistics import DAY_S
from recclr.topk import top_k_of_scores

# Floats of one block of scores; two such blocks are alive at a time.
_BLOCK = 1 << 25


def popularity(log: EncodedLog, cutoff: int | None, half_life_d: float | None) -> Tensor:
    """Train weight per item, float64 [V]; halved every ``half_life_d`` days before the cut-off.

    Args:
        half_life_d: None counts all of train alike.
    """
    counts = torch.zeros(log.num_items, dtype=torch.float64)
    for rows in log.stretches():
        weight = torch.ones(len(rows), dtype=torch.float64)
        if rows.weight is not None:
            weight = rows.weight.double()
        if half_life_d is not None and rows.timestamp is not None and cutoff is not None:
            weight = weight * recency(rows.timestamp, cutoff, half_life_d)
        counts.index_add_(0, rows.item_idx.long(), weight)
    return counts


def recency(timestamp: Tensor, cutoff: int, half_life_d: float) -> Tensor:
    """2^(-age / half-life) of each event, float64 [n] in (0, 1]."""
    return torch.exp2((timestamp - cutoff).double() / (DAY_S * half_life_d))


class PopularityRanker:
    """Shows everybody the same items, best first, less those they have.

    Args:
        scores: float [V]; ties by item index.
    """

    def __init__(self, name: str, scores: Tensor) -> None:
        self.name = name
        # Places instead of scores: distinct in float32 whatever the range of the scores.
        order = torch.argsort(scores, descending=True, stable=True)
        self.places = torch.empty(len(scores), dtype=torch.float32)
        self.places[order] = -torch.arange(len(scores), dtype=torch.float32)

    def top_k(
        self, user_idx: Tensor, k: int, *, seen: Csr | None = None, items: Tensor | None = None
    ) -> TopK:
        """See ``ranking.Ranker``; the scores are minus the place in the list of all items."""
        ranked = torch.arange(len(self.places)) if items is None else items
        # Nobody can have seen more of the first places than their whole history.
        deepest = k + (int(seen.lengths().max()) if seen is not None and seen.num_rows else 0)
        best = self.places[ranked].topk(min(deepest, len(ranked))).indices
        ranked = ranked[best].sort().values
        scores = self.places.expand(len(user_idx), -1)
        return top_k_of_scores(scores, k, seen=seen, items=ranked)


class ScoreRanker:
    """Ranks by scores that are computed for a block of users at a time.

    Args:
        score: int64 [Q] known users -> float32 [Q, V].
    """

    def __init__(self, name: str, num_items: int, score: Callable[[Tensor], Tensor]) -> None:
        self.name, self.num_items, self.score = name, num_items, score

    def top_k(
        self, user_idx: Tensor, k: int, *, seen: Csr | None = None, items: Tensor | None = None
    ) -> TopK:
        """See ``ranking.Ranker``."""
        rows = max(1, _BLOCK // max(self.num_items, 1))
        parts = []
        for positions in torch.split(torch.arange(len(user_idx)), rows):
            block = None if seen is None else seen.take(positions)
            scores = self.score(user_idx[positions])
            parts.append(top_k_of_scores(scores, k, seen=block, items=items))
        return _stacked(parts, k)


class BackedRanker:
    """A ranker for users with a history; everybody else gets the fallback.

    Args:
        known: bool [num_users]: users with a train interaction.
    """

    def __init__(self, ranker: Ranker, fallback: Ranker, known: Tensor) -> None:
        self.name = ranker.name
        self.ranker, self.fallback = ranker, fallback
        self.known = torch.cat([known, torch.zeros(1, dtype=torch.bool)])

    def top_k(
        self, user_idx: Tensor, k: int, *, seen: Csr | None = None, items: Tensor | None = None
    ) -> TopK:
        """See ``ranking.Ranker``."""
        known = self.known[user_idx.clamp(max=len(self.known) - 1)]
        item_idx = torch.full((len(user_idx), k), -1, dtype=torch.int64)
        scores = torch.full((len(user_idx), k), -torch.inf)
        for ranker, chosen in ((self.ranker, known), (self.fallback, ~known)):
            rows = chosen.nonzero().squeeze(1)
            if len(rows):
                part = None if seen is None else seen.take(rows)
                found = ranker.top_k(user_idx[rows], k, seen=part, items=items)
                item_idx[rows], scores[rows] = found.item_idx, found.scores
        return TopK(item_idx, scores)


def _stacked(parts: list[TopK], k: int) -> TopK:
    if not parts:
        return TopK(torch.empty((0, k), dtype=torch.int64), torch.empty((0, k)))
    return TopK(torch.cat([p.item_idx for p in parts]), torch.cat([p.scores for p in parts]))
