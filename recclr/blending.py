"""Vectors of several models laid side by side: one model, since dot products add.

Shape letters: U users (the last row serves unknown ones), V items, D dimension of one model.

Each part's user rows are scaled to one length, and the part to scores of standard deviation 1 over
the catalogue for the average user, so that a weight says how much of the ranking a part decides
whatever the models are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recclr.errors import ShapeError
from recclr.order import generator

_SAMPLE, _BLEND = 2048, 0xB1E4D


class Vectors(NamedTuple):
    """Of one model: users float32 [U, D], items float32 [V, D]."""

    users: Tensor
    items: Tensor


@dataclass(frozen=True)
class Choice:
    """What ``choose_weights`` found: a weight for each part after the first, and its value, None
    where nothing was to choose; of each part the values of all weights that were tried.
    """

    weights: tuple[float, ...]
    value: float | None
    tried: tuple[dict[float, float], ...]


def of_equal_spread(part: Vectors, *, seed: int = 0) -> Vectors:
    """Users of length 1, and scores of standard deviation 1 over the items for the average user.

    A user of zeros stays one. Where all scores are equal only the users are scaled.

    Args:
        seed: of the sample of 2,048 users that the spread is measured on.
    """
    users = torch.nn.functional.normalize(part.users.float(), dim=1)
    some = (users != 0).any(1).nonzero().squeeze(1)
    if len(some) > _SAMPLE:
        some = some[torch.randperm(len(some), generator=generator("cpu", seed, _BLEND))[:_SAMPLE]]
    spread = _spread(users[some], part.items.float())
    return Vectors(users, part.items.float() / (spread if spread > 0 else 1.0))


def _spread(users: Tensor, items: Tensor) -> float:
    """Mean over users of the standard deviation of their scores, by second moments: O(V·D²)."""
    if not len(users) or len(items) < 2:
        return 0.0
    centred = items - items.mean(0)
    covariance = centred.T @ centred / len(items)
    variances = ((users @ covariance) * users).sum(1).clamp_min(0)
    return float(variances.sqrt().mean())


def laid_side_by_side(parts: Sequence[Vectors], weights: Sequence[float]) -> Vectors:
    """One model whose score is Σ weight · score of the part; parts of weight 0 are left out.

    Args:
        parts: at least one, of the same users and items. weights: as many, not negative.

    Raises:
        ShapeError: parts of different users or items, or another number of weights.
    """
    sizes = {(len(part.users), len(part.items)) for part in parts}
    if len(sizes) != 1 or len(weights) != len(parts):
        raise ShapeError(
            f"expected parts of the same users and items and a weight for each, found "
            f"{sorted(sizes)} and {len(weights)} weights for {len(parts)} parts"
        )
    kept = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight > 0]
    kept = kept or [(parts[0], 0.0)]
    # Half of a weight on each side: rows stay of a size, which stores that round are grateful for.
    return Vectors(
        torch.cat([part.users * weight**0.5 for part, weight in kept], 1),
        torch.cat([part.items * weight**0.5 for part, weight in kept], 1),
    )


def choose_weights(
    parts: Sequence[Vectors],
    judge: Callable[[Vectors], float],
    tried: Sequence[float],
    *,
    rounds: int = 2,
) -> Choice:
    """Weights of the parts after the first, which has 1: one at a time, the best of those tried.

    Among equals the smallest weight stays, so a part that adds nothing gets none if 0 is tried.

    Args:
        parts: as ``laid_side_by_side``. judge: larger is better; of validation, never of test.
        rounds: how often each part is looked at again while the others stand, where there are
            several besides the first.
    """
    order = sorted(tried)
    weights, best = [1.0, *([order[0]] * (len(parts) - 1))], -float("inf")
    values: list[dict[float, float]] = [{} for _ in parts[1:]]
    for _ in range(rounds if len(parts) > 2 else 1):
        for place in range(1, len(parts)):
            found = {}
            for weight in order:
                weights[place] = weight
                found[weight] = judge(laid_side_by_side(parts, weights))
            values[place - 1] = found
            best = max(found.values())
            weights[place] = next(weight for weight in order if found[weight] == best)
    return Choice(tuple(weights[1:]), best, tuple(values))


def compressed(vectors: Vectors, dim: int) -> Vectors:
    """The model of ``dim`` dimensions whose scores of all users and items are nearest in squares.

    That is the truncated SVD of users · itemsᵀ (Eckart and Young 1936), found without forming that
    matrix: from the R factors of both sides, O((U + V)·D²). With ``dim`` at or above D nothing is
    lost.
    """
    size = min(dim, *vectors.users.shape, len(vectors.items))
    left, right = (torch.linalg.qr(side.double()) for side in vectors)
    u, s, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    root = s[:size].sqrt()
    users, items = left.Q @ (u[:, :size] * root), right.Q @ (vh[:size].T * root)
    return Vectors(users.float(), items.float())
