"""Item-kNN: an item is worth what its co-occurrences with the user's items say.

Sarwar et al. 2001, "Item-based collaborative filtering recommendation algorithms"; the recency
weight on the recommended item's events is what makes it strong on logs whose taste moves.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from recclr.baselines.matrices import interactions, largest_per_row
from recclr.baselines.popularity import ScoreRanker, recency
from recclr.data.log import Prepared

# Items whose co-occurrences are counted at a time; bounds memory, not the result.
_ITEMS = 2048


def item_knn(
    name: str,
    prepared: Prepared,
    fallback: Tensor,
    *,
    neighbours: int,
    shrink: float,
    norm: float,
    half_life_d: float | None = None,
) -> ScoreRanker:
    """Rank by the sum, over the user's items i, of the similarity of i and j.

    similarity(i, j) = Σ_u w(u, j) / ((n_i^½ · m_j^norm) + shrink), over the users of both, where
    w is the recency of u's events with j (1 without a half-life), n_i counts users and m_j sums w.

    Args:
        fallback: float [V]: orders the items that share no user with the history.
        neighbours: similar items kept per item. shrink: damps pairs seen rarely.
        norm: 0.5 is cosine, 0 leaves the popularity of j in.
        half_life_d: of w, in days; None for w = 1.
    """
    log = prepared.train
    weights = None
    if half_life_d is not None and log.timestamp is not None and prepared.cutoff is not None:
        weights = recency(log.timestamp, prepared.cutoff, half_life_d)
    users = interactions(log)
    weighted = users if weights is None else interactions(log, weights)
    similarity = _similarity(users, weighted, neighbours=neighbours, shrink=shrink, norm=norm)
    # Below every similarity, which is positive.
    places = torch.argsort(torch.argsort(fallback, stable=True)).float()
    unscored = places / max(len(places), 1) - 1.0

    def score(user_idx: Tensor) -> Tensor:
        scores = torch.from_numpy((users[user_idx.numpy()] @ similarity).toarray())
        return torch.where(scores > 0, scores, unscored)

    return ScoreRanker(name, log.num_items, score)


def _similarity(
    users: sp.csr_matrix, weighted: sp.csr_matrix, *, neighbours: int, shrink: float, norm: float
) -> sp.csr_matrix:
    """float32 [V, V], row i holding the items most similar to i."""
    count = np.asarray(users.sum(0)).ravel()
    mass = np.maximum(np.asarray(weighted.sum(0)).ravel(), 1e-12)
    by_item = users.T.tocsr()
    blocks = []
    for start in range(0, by_item.shape[0], _ITEMS):
        together = (by_item[start : start + _ITEMS] @ weighted).tocoo()
        rows, columns = together.row, together.col
        value = together.data / (np.sqrt(count[rows + start]) * mass[columns] ** norm + shrink)
        value[rows + start == columns] = 0.0
        block = sp.csr_matrix((value.astype(np.float32), (rows, columns)), shape=together.shape)
        block.eliminate_zeros()
        blocks.append(largest_per_row(block, neighbours))
    return sp.vstack(blocks, format="csr")
