"""Ranking metrics as pure functions of hits, with the definitions that every report prints.

Shape letters: Q queries, K ranked items (the longest cut-off).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from recclr.errors import ShapeError

# Queries whose metrics are reckoned together: what stands between takes some kilobytes for each.
_ROWS = 1 << 14

DEFINITIONS = {
    "recall@k": "hits in the top k / number of relevant items",
    "capped_recall@k": "hits in the top k / min(k, number of relevant items)",
    "hit_rate@k": "1 if the top k holds a relevant item, else 0",
    "ndcg@k": "sum of 1/log2(rank + 1) over hits in the top k / the same for an ideal ranking, "
    "which starts with min(k, relevant) hits",
    "mrr@k": "1 / rank of the first hit within the top k, 0 without one",
    "map@k": "precision at the rank of each hit in the top k, summed / min(k, relevant)",
    "precision@k": "hits in the top k / k",
    "mean": "every metric is a mean over users with at least one relevant item; the others are "
    "dropped and counted",
    "ranking": "over the whole corpus, the user's train (and, for test, validation) items left "
    "out unless evaluate.keep_seen; ties stand in order of item index",
    "interval": "95 % percentile bootstrap over users",
}


def ranking_metrics(
    hits_QK: Tensor, num_relevant_Q: Tensor, ks: Sequence[int]
) -> dict[str, Tensor]:
    """Every metric at every cut-off, per query.

    Args:
        hits_QK: bool [Q, K], best rank first; K at least max(ks).
        num_relevant_Q: integer [Q], at least 1 each.
        ks: cut-offs.

    Returns:
        "recall@20" and so on, float64 [Q] each; empty tensors for Q = 0.

    Raises:
        ShapeError: K is below the largest cut-off, or a query has nothing relevant.
    """
    return Hits.of(hits_QK, num_relevant_Q, ks).metrics()


@dataclass(frozen=True, eq=False)
class Hits:
    """What metrics are reckoned from, in a tenth of what these take: 224 bytes a query at four ks.

    Attributes:
        num_queries: Q. ks: cut-offs.
        rows: int64 [R], rising: queries that have a hit. In a large corpus most have none, and
            nothing to reckon with.
        hits: bool [R, K]. num_relevant: integer [R].
    """

    num_queries: int
    ks: tuple[int, ...]
    rows: Tensor
    hits: Tensor
    num_relevant: Tensor

    @classmethod
    def of(cls, hits_QK: Tensor, num_relevant_Q: Tensor, ks: Sequence[int]) -> Hits:
        """See ``ranking_metrics``."""
        if hits_QK.ndim != 2 or hits_QK.shape[1] < max(ks) or len(num_relevant_Q) != len(hits_QK):
            raise ShapeError(
                f"expected hits [Q, at least {max(ks)}] and {len(hits_QK)} relevant counts, found "
                f"{tuple(hits_QK.shape)} and {len(num_relevant_Q)}"
            )
        if len(num_relevant_Q) and int(num_relevant_Q.min()) < 1:
            raise ShapeError("a query without relevant items has no metrics; drop and count it")
        rows = hits_QK.any(1).nonzero().squeeze(1)
        return cls(len(hits_QK), tuple(ks), rows, hits_QK[rows], num_relevant_Q[rows])

    def metrics(self) -> dict[str, Tensor]:
        """Float64 [Q] each, by name."""
        found: dict[str, Tensor] = {}
        parts = (torch.split(t, _ROWS) for t in (self.rows, self.hits, self.num_relevant))
        for rows, hits, num_relevant in zip(*parts, strict=True):
            for name, values in _of_hits(hits.double(), num_relevant.double(), self.ks).items():
                if name not in found:
                    found[name] = values.new_zeros(self.num_queries)
                found[name][rows] = values
        return found


class PerUser(Mapping[str, Mapping[str, Tensor]]):
    """{slice: {metric: float64 [queries of the slice]}}, not to be written into.

    Reckoned when another slice than the last one is asked for: kept for every slice and ranker, the
    figures of a million users would take gigabytes.
    """

    def __init__(self, hits: Mapping[str, Hits]) -> None:
        self._hits = hits
        self._last: tuple[str, Mapping[str, Tensor]] | None = None

    def __getitem__(self, part: str) -> Mapping[str, Tensor]:
        if self._last is None or self._last[0] != part:
            self._last = part, MappingProxyType(self._hits[part].metrics())
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._hits)

    def __len__(self) -> int:
        return len(self._hits)


def _of_hits(hits: Tensor, relevant: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """As ``ranking_metrics``, of float64 [Q, K] and [Q]."""
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device).double()
    discounts = 1 / torch.log2(ranks + 1)
    ideals = discounts.cumsum(0)
    hit_counts = hits.cumsum(1)
    gains = (hits * discounts).cumsum(1)
    precisions = (hits * hit_counts / ranks).cumsum(1)
    # The running maximum of 1/rank over hits is that of the first hit.
    reciprocals = (hits / ranks).cummax(1).values if hits.shape[1] else hits
    result = {}
    for k in ks:
        count = hit_counts[:, k - 1]
        capped = relevant.clamp(max=k)
        result[f"recall@{k}"] = count / relevant
        result[f"capped_recall@{k}"] = count / capped
        result[f"hit_rate@{k}"] = (count > 0).double()
        result[f"ndcg@{k}"] = gains[:, k - 1] / ideals[capped.long() - 1]
        result[f"mrr@{k}"] = reciprocals[:, k - 1]
        result[f"map@{k}"] = precisions[:, k - 1] / capped
        result[f"precision@{k}"] = count / k
    return result
