"""Uncertainty of means over users: percentile bootstrap, and paired differences.

Shape letters: U users, M metrics, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from recclr.errors import ShapeError
from recclr.kernels import native
from recclr.order import keyed_below, keyed_bits, mix

_CHUNK_ELEMENTS = 1 << 24
# Draws that the twin of the kernel makes together.
_BLOCK = 1 << 16
_LEVEL = 0.95
_RESAMPLE, _FLIP = 0, 1


def resampled_means(values_UM: Tensor, num_resamples: int, *, seed: int = 0) -> Tensor:
    """Means of the columns over resampled users, float64 [S, M].

    A resample draws U users with replacement (Efron 1979). The counts of one resample weigh all
    metrics, so that their intervals belong together: cost S·U·M multiply-adds, no sort over users.
    The same draws for the same seed and U, whatever the columns and however many threads.

    Args:
        values_UM: float64 [U, M], U at least 1.
        num_resamples: S, at least 2.

    Raises:
        ShapeError: nothing to resample.
    """
    if values_UM.ndim != 2 or not len(values_UM) or num_resamples < 2:
        raise ShapeError(
            f"a bootstrap needs values [users, metrics] and 2 resamples, found "
            f"{tuple(values_UM.shape)} and {num_resamples}"
        )
    return torch.cat(
        list(_weighted_means(values_UM.cpu(), num_resamples, _draw_counts, seed, _RESAMPLE))
    )


def interval_of(means: Tensor) -> tuple[Tensor, Tensor]:
    """95 % percentile intervals, (low, high) float64 [M], of the means of ``resampled_means``."""
    tails = torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, tails, dim=0)
    return low, high


def paired_differences(
    differences_UM: Tensor,
    *,
    num_resamples: int,
    seed: int = 0,
    means_SM: Tensor | None = None,
) -> list[dict[str, float]]:
    """Mean of each column of differences over users, with interval and sign-flip p-value.

    Columns share their resamples: a table of many differences costs one set of draws.

    Args:
        differences_UM: float64 [U, M], ours minus theirs, user by user.
        means_SM: their ``resampled_means``, where the caller has them.

    Returns:
        Per column ``difference``, ``low``, ``high`` and ``p_value`` (two-sided, at least
        1 / (S + 1): the share of random sign flips of the differences whose mean is as far from
        0).
    """
    differences = differences_UM.double().cpu()
    if means_SM is None:
        means_SM = resampled_means(differences, num_resamples, seed=seed)
    low, high = interval_of(means_SM)
    means = differences.mean(0)
    extreme = torch.zeros(len(means), dtype=torch.int64)
    for flipped in _weighted_means(differences, num_resamples, _draw_signs, seed, _FLIP):
        extreme += (flipped.abs() >= means.abs() - 1e-15).sum(0)
    p_values = (extreme + 1).double() / (num_resamples + 1)
    columns = (means.tolist(), low.tolist(), high.tolist(), p_values.tolist())
    names = ("difference", "low", "high", "p_value")
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _weighted_means(
    values: Tensor, num_resamples: int, draw: Callable[[Tensor, Tensor], None], *keys: int
) -> Iterator[Tensor]:
    """Means of the columns under drawn weights, float64 [some of S, M] at a time.

    Args:
        draw: given seeds int64 [n], fills weights float64 [n, U].
    """
    num_users = len(values)
    rows = min(max(1, _CHUNK_ELEMENTS // num_users), num_resamples)
    seeds = torch.tensor([mix(*keys, num_users, number) for number in range(num_resamples)])
    weights = torch.empty(rows, num_users, dtype=torch.float64)
    for some in torch.split(seeds, rows):
        drawn = weights[: len(some)]
        draw(some, drawn)
        yield drawn @ values / num_users


def _draw_counts(seeds: Tensor, weights: Tensor) -> None:
    """How often each user is drawn, of as many draws as there are users."""
    count, num_users = weights.shape
    kernels = native.usable(weights)
    if kernels is not None:
        threads = native.threads_for(weights.numel())
        where = native.address(seeds, torch.int64), native.address(weights, torch.float64)
        kernels.recclr_resample(count, num_users, *where, threads)
        return
    # A few rows at once: neither a call for each of a few users, nor all draws in memory.
    height = max(1, _BLOCK // num_users)
    for rows, own in zip(torch.split(weights, height), torch.split(seeds, height), strict=True):
        picks = keyed_below(own[:, None], torch.arange(num_users), num_users)
        picks += torch.arange(len(rows))[:, None] * num_users
        rows.copy_(torch.bincount(picks.view(-1), minlength=rows.numel()).view_as(rows))


def _draw_signs(seeds: Tensor, weights: Tensor) -> None:
    """1 or -1 for each user."""
    num_users = weights.shape[1]
    bits = keyed_bits(seeds[:, None], torch.arange(-(-num_users // 64))).numpy()
    signs = np.unpackbits(bits.view(np.uint8), axis=1, count=num_users, bitorder="little")
    weights.copy_(torch.from_numpy(signs)).mul_(2).sub_(1)
