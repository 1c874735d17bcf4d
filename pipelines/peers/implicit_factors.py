"""implicit's BPR and ALS on the CPU: no two towers, but what many train in their place."""

from __future__ import annotations

from typing import Any

import numpy as np
from bench import memory
from bench.timing import repeated


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Epochs of BPR (one negative per positive) or sweeps of ALS, by ``task["model"]``."""
    import implicit
    from implicit.als import AlternatingLeastSquares
    from implicit.bpr import BayesianPersonalizedRanking
    from scipy.sparse import csr_matrix
    from threadpoolctl import threadpool_limits

    users, items = np.load(task["users"]), np.load(task["items"])
    ones = np.ones(len(users), dtype=np.float32)
    matrix = csr_matrix((ones, (users, items)), shape=(task["num_users"], task["num_items"]))
    kind = BayesianPersonalizedRanking if task["model"] == "bpr" else AlternatingLeastSquares
    # One epoch or sweep per call of fit, which goes on from the factors of the call before.
    model = kind(factors=task["dim"], iterations=1, num_threads=task["threads"], random_state=1)
    # implicit has threads of its own and asks for BLAS to have one.
    with threadpool_limits(1, "blas"):
        model.fit(matrix, show_progress=False)
        memory.reset_peak()
        times = repeated(lambda number: model.fit(matrix, show_progress=False), task["seconds"])
    return times | {
        "amount": matrix.nnz,
        "unit": "positives/s",
        "version": implicit.__version__,
        "peak_memory_mb": memory.peak_mb(),
    }
