"""EASE: the linear autoencoder with a closed form (Steck 2019, eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from recclr.baselines.matrices import interactions
from recclr.baselines.popularity import ScoreRanker
from recclr.data.log import Prepared


def ease(prepared: Prepared, *, regularization: float) -> ScoreRanker:
    """Rank by x_u · B with B = I - P / diag(P), P = (XᵀX + λI)⁻¹ and a zero diagonal.

    Dense: 8 V² bytes and V³ multiplications, which is why the catalogue is limited.

    Args:
        regularization: λ, in interactions.
    """
    users = interactions(prepared.train)
    gram = torch.from_numpy((users.T @ users).toarray())
    gram.diagonal().add_(regularization)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weights = inverse.div_(-inverse.diagonal().clone()).numpy()
    weights[range(len(weights)), range(len(weights))] = 0.0

    def score(user_idx: Tensor) -> Tensor:
        return torch.from_numpy(users[user_idx.numpy()] @ weights)

    return ScoreRanker("ease", prepared.train.num_items, score)
