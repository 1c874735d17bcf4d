"""Exact top-k from an engine whose own scores are approximate in the last digits.

Shape letters: Q queries, K cut-off, F items fetched per query, M = Q × F, V items, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recclr.data.log import Csr
from recclr.export.manifest import Manifest
from recclr.ranking import TopK

Fetch = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
"""(queries [Q, D], F) -> query of each row int64 [M], item row int64 [M], vectors [M, D]: the F
best items of each query by the engine, in any order."""

_SLACK = 16
# Floats fetched at once, 64 MiB of vectors.
_BUDGET = 1 << 24


def nearest(fetch: Fetch, manifest: Manifest, queries: Tensor, k: int, seen: Csr | None) -> TopK:
    """The ``k`` best items per query by exact scores, ties by item row.

    More than k are fetched and scored again in float64. When even the worst of them lies below the
    k-th by more than the engine can err (by a float32 sum, and by the rounding of 1 - dot), nothing
    that was not fetched can belong to the answer; otherwise four times as many are fetched, up to
    all.

    Args:
        queries: float32 [Q, D]. seen: Q rows of item rows to leave out.

    Returns:
        int64 / float32 [Q, K]; -1 / -inf where items ran out.
    """
    num_items = manifest.num_items
    item_rows = torch.full((len(queries), k), -1, dtype=torch.int64)
    scores = torch.full((len(queries), k), -torch.inf)
    if not len(queries):
        return TopK(item_rows, scores)
    lengths = torch.zeros(len(queries), dtype=torch.int64) if seen is None else seen.lengths()
    error = 2 * (manifest.score_tolerance(queries) + torch.finfo(torch.float32).eps)
    # By length, since a batch fetches as many items as its longest list of seen ones demands.
    order = lengths.argsort(descending=True, stable=True)
    pending = [(rows, k + int(lengths[rows[0]]) + _SLACK) for rows in torch.split(order, 256)]
    while pending:
        rows, count = pending.pop()
        count = min(count, num_items)
        if len(rows) > 1 and len(rows) * count * manifest.embedding_dim > _BUDGET:
            pending += [(half, count) for half in torch.tensor_split(rows, 2)]
            continue
        part = None if seen is None else seen.take(rows)
        found, worst = _rank(fetch(queries[rows], count), queries[rows], k, part, num_items)
        item_rows[rows], scores[rows] = found.item_idx, found.scores
        unsettled = ~(found.scores[:, -1] > worst + error[rows])
        if count < num_items and unsettled.any():
            pending.append((rows[unsettled], 4 * count))
    return TopK(item_rows, scores)


def _rank(
    fetched: tuple[Tensor, Tensor, Tensor],
    queries: Tensor,
    k: int,
    seen: Csr | None,
    num_items: int,
) -> tuple[TopK, Tensor]:
    """Top-k among the rows fetched, and the worst score fetched per query, float32 [Q]."""
    query_rows, item_rows, vectors = fetched
    exact = (queries[query_rows].double() * vectors.double()).sum(1).float()
    worst = torch.full((len(queries),), torch.inf).scatter_reduce(0, query_rows, exact, "amin")
    if seen is not None:
        left_out = seen.row_numbers() * num_items + seen.values
        kept = ~torch.isin(query_rows * num_items + item_rows, left_out)
        query_rows, item_rows, exact = query_rows[kept], item_rows[kept], exact[kept]
    # Three stable sorts, the last key first: by query, by score downward, by item row.
    order = item_rows.argsort(stable=True)
    order = order[exact[order].argsort(descending=True, stable=True)]
    order = order[query_rows[order].argsort(stable=True)]
    query_rows, item_rows, exact = query_rows[order], item_rows[order], exact[order]
    starts = torch.searchsorted(query_rows, torch.arange(len(queries)))
    rank = torch.arange(len(query_rows)) - starts[query_rows]
    best = rank < k
    found = TopK(
        torch.full((len(queries), k), -1, dtype=torch.int64),
        torch.full((len(queries), k), -torch.inf),
    )
    found.item_idx[query_rows[best], rank[best]] = item_rows[best]
    found.scores[query_rows[best], rank[best]] = exact[best]
    return found, worst
