"""Bags of table rows, the same for every table. NumPy only: peers may run without recclr."""

from __future__ import annotations

from typing import Any

import numpy as np

# Drawn beforehand and taken in turn: enough that no cache remembers a bag's rows.
_BATCHES = 16


def draw(task: dict[str, Any]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Rows of a few batches of bags, uniform with repeats, int64 [bags · size] each; and to all of
    them the start of each bag, int64 [bags], and the gradient of their sums, float32 [bags, dim].

    Args:
        task: ``num_rows`` of the table, ``num_bags`` of a batch, ``bag_size``, ``dim``.
    """
    draws = np.random.default_rng(0)
    num_bags, size = task["num_bags"], task["bag_size"]
    values = [draws.integers(task["num_rows"], size=num_bags * size) for _ in range(_BATCHES)]
    gradient = draws.standard_normal((num_bags, task["dim"]), dtype=np.float32)
    return values, np.arange(0, num_bags * size, size), gradient
