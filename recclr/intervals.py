"""Intervals of evaluations: all rankers and metrics of a slice share the resamples of its users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recclr.bootstrap import interval_of, resampled_means

# Of a ranker: {slice: {metric: float64 [users of the slice]}}.
Figures = Mapping[str, Mapping[str, Tensor]]
# Of a ranker: {slice: {metric: float64 [resamples]}}.
Resampled = dict[str, dict[str, Tensor]]


def resampled(rankers: Sequence[Figures], num_bootstrap: int, *, seed: int = 0) -> list[Resampled]:
    """Means of every metric over resampled users of each slice, by ranker.

    Many rankers cost hardly more than one.

    Args:
        rankers: ``Evaluation.per_user`` of each, on one ``EvaluationSet``; may be none.
        num_bootstrap: at least 2.

    Raises:
        ShapeError: fewer resamples, or a slice without users.
    """
    found: list[Resampled] = [{} for _ in rankers]
    for part in rankers[0] if rankers else ():
        # One ranker's figures after the other: they may be reckoned only now.
        names, columns = [], []
        for ranker in rankers:
            figures = ranker[part]
            names.append(list(figures))
            columns.append(torch.stack(list(figures.values()), 1))
        means = resampled_means(torch.cat(columns, 1), num_bootstrap, seed=seed)
        each = iter(means.unbind(1))
        for own, metrics in zip(found, names, strict=True):
            own[part] = {metric: next(each) for metric in metrics}
    return found


def intervals(means: Resampled) -> dict[str, dict[str, tuple[float, float]]]:
    """95 % percentile intervals, as ``Evaluation.intervals`` has them."""
    found = {}
    for part, values in means.items():
        bounds = interval_of(torch.stack(list(values.values()), 1))
        pairs = zip(*(bound.tolist() for bound in bounds), strict=True)
        found[part] = dict(zip(values, pairs, strict=True))
    return found
