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


def paired_difference(
    ours_U: Tensor, theirs_U: Tensor | float, *, num_resamples: int, seed: int = 0
) -> dict[str, float]:
    """Mean of ``ours - theirs`` over the same users, with interval and sign-flip p-value.

    Args:
        ours_U: float64 [U]. theirs_U: float64 [U] in the same order, or a constant such as chance.

    Returns:
        ``difference``, ``low``, ``high`` and ``p_value`` (two-sided, at least 1 / (S + 1): the
        share of random sign flips of the differences whose mean is as far from 0).
    """
    if isinstance(theirs_U, Tensor) and theirs_U.shape != ours_U.shape:
        raise ShapeError(
            f"paired rankers must be judged on the same users, found {len(ours_U)} and "
            f"{len(theirs_U)}"
        )
    differences = (ours_U - theirs_U).double().cpu()
    mean = float(differences.mean())
    low, high = bootstrap_interval(differences[:, None], num_resamples, seed=seed)
    draws = generator("cpu", seed, len(differences), 1)
    extreme, rows = 0, max(1, _CHUNK_ELEMENTS // len(differences))
    for start in range(0, num_resamples, rows):
        count = min(rows, num_resamples - start)
        signs = torch.randint(2, (count, len(differences)), generator=draws).double() * 2 - 1
        flipped = signs @ differences / len(differences)
        extreme += int((flipped.abs() >= abs(mean) - 1e-15).sum())
    return {
        "difference": mean,
        "low": float(low),
        "high": float(high),
        "p_value": (extreme + 1) / (num_resamples + 1),
    }
