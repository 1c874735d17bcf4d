"""Uncertainty of means over users: percentile bootstrap, and paired differences.

Shape letters: U users, M metrics, S resamples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recclr.errors import ShapeError
from recclr.order import generator

_CHUNK_ELEMENTS = 1 << 24
_LEVEL = 0.95


def bootstrap_interval(
    values_UM: Tensor, num_resamples: int, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """95 % percentile intervals of the mean over users, all metrics at once.

    A resample draws U users with replacement (Efron 1979). The counts of one resample weigh all
    metrics, so that their intervals belong together: cost S·U·M multiply-adds, no sort over users.

    Args:
        values_UM: float64 [U, M], U at least 1.
        num_resamples: S, at least 2.

    Returns:
        (low, high), float64 [M].
    """
    if values_UM.ndim != 2 or not len(values_UM) or num_resamples < 2:
        raise ShapeError(
            f"a bootstrap needs values [users, metrics] and 2 resamples, found "
            f"{tuple(values_UM.shape)} and {num_resamples}"
        )
    num_users = len(values_UM)
    draws = generator("cpu", seed, num_users)
    values = values_UM.cpu()
    means = []
    rows = max(1, _CHUNK_ELEMENTS // num_users)
    for start in range(0, num_resamples, rows):
        count = min(rows, num_resamples - start)
        picks = torch.randint(num_users, (count, num_users), generator=draws)
        picks += (torch.arange(count) * num_users)[:, None]
        counts = torch.bincount(picks.flatten(), minlength=count * num_users)
        means.append(counts.view(count, num_users).double() @ values / num_users)
    tails = torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), tails, dim=0)
    return low, high


def paired_differences(
    differences_UM: Tensor, *, num_resamples: int, seed: int = 0
) -> list[dict[str, float]]:
    """Mean of each column of differences over users, with interval and sign-flip p-value.

    Columns share their resamples: a table of many differences costs one set of draws.

    Args:
        differences_UM: float64 [U, M], ours minus theirs, user by user.

    Returns:
        Per column ``difference``, ``low``, ``high`` and ``p_value`` (two-sided, at least
        1 / (S + 1): the share of random sign flips of the differences whose mean is as far from
        0).
    """
    differences = differences_UM.double().cpu()
    low, high = bootstrap_interval(differences, num_resamples, seed=seed)
    num_users, means = len(differences), differences.mean(0)
    draws = generator("cpu", seed, num_users, 1)
    extreme = torch.zeros(len(means), dtype=torch.int64)
    rows = max(1, _CHUNK_ELEMENTS // num_users)
    for start in range(0, num_resamples, rows):
        count = min(rows, num_resamples - start)
        signs = torch.randint(2, (count, num_users), generator=draws, dtype=torch.int8)
        flipped = (signs.double() * 2 - 1) @ differences / num_users
        extreme += (flipped.abs() >= means.abs() - 1e-15).sum(0)
    p_values = (extreme + 1).double() / (num_resamples + 1)
    columns = (means.tolist(), low.tolist(), high.tolist(), p_values.tolist())
    names = ("difference", "low", "high", "p_value")
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
