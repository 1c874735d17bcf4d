"""Factorisations: ALS and BPR from the implicit library, and the spectral baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from recclr.baselines.matrices import interactions
from recclr.data.log import Prepared
from recclr.errors import require
from recclr.spectral import spectral_factors
from recclr.topk import EmbeddingRanker


def als(
    prepared: Prepared,
    *,
    dim: int,
    regularization: float,
    alpha: float,
    iterations: int,
    seed: int,
) -> EmbeddingRanker:
    """Weighted matrix factorisation by alternating least squares (Hu, Koren & Volinsky 2008).

    Args:
        alpha: the confidence of a pair is 1 + alpha · weight, weights of repeated rows added up;
            of a pair without interaction it is 1.
        regularization: λ of the squared length of every vector.
    """
    library: Any = require("implicit.als", "baselines")
    model = library.AlternatingLeastSquares(
        factors=dim,
        regularization=regularization,
        iterations=iterations,
        random_state=seed,
        use_gpu=False,
    )
    confidence = interactions(prepared.train, prepared.train.weight)
    # The library takes confidences; its own alpha multiplies them, without the 1 of eq. 2, and
    # would trust an interaction of small weight less than none at all.
    confidence.data = 1 + alpha * confidence.data
    _fit(model, confidence)
    return _ranker("als", model.user_factors, model.item_factors)


def bpr(
    prepared: Prepared,
    *,
    dim: int,
    learning_rate: float,
    regularization: float,
    iterations: int,
    seed: int,
) -> EmbeddingRanker:
    """Bayesian personalised ranking (Rendle et al. 2009); one thread, so that a seed decides it."""
    library: Any = require("implicit.bpr", "baselines")
    model = library.BayesianPersonalizedRanking(
        factors=dim,
        learning_rate=learning_rate,
        regularization=regularization,
        iterations=iterations,
        random_state=seed,
        num_threads=1,
        use_gpu=False,
    )
    _fit(model, interactions(prepared.train))
    return _ranker("bpr", model.user_factors, model.item_factors)


def spectral(prepared: Prepared, *, dim: int, item_power: float, seed: int) -> EmbeddingRanker:
    """See ``spectral.spectral_factors``: two towers without training."""
    log = prepared.train
    dim = min(dim, log.num_users, log.num_items)
    users, items = spectral_factors(log, dim=dim, item_power=item_power, seed=seed)
    return _ranker("spectral", users.numpy(), items.numpy())


def _fit(model: Any, matrix: sp.csr_matrix) -> None:
    # implicit runs its own threads; a BLAS pool under each of them makes it many times slower.
    threads: Any = require("threadpoolctl", "baselines")
    with threads.threadpool_limits(1, "blas"):
        model.fit(matrix, show_progress=False)


def _ranker(name: str, users: NDArray[Any], items: NDArray[Any]) -> EmbeddingRanker:
    """The last row, of unknown users, is zero; ``BackedRanker`` never asks for it."""
    user_vectors = torch.from_numpy(np.asarray(users, dtype=np.float32))
    nobody = torch.zeros((1, user_vectors.shape[1]))
    item_vectors = torch.from_numpy(np.ascontiguousarray(items, dtype=np.float32))
    return EmbeddingRanker(name, torch.cat([user_vectors, nobody]), item_vectors)
