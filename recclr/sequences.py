"""Histories as training shows them: a stretch of them, without some items, in another order.

Crop, mask and reorder of Xie et al. 2022 ("Contrastive Learning for Sequential Recommendation"),
for histories that are pooled by recency: the order of items is that of their weights. All draws of
a row follow from one seed and the place in its history, so that ragged and padded rows draw alike.

Shape letters: M rows, n items of all histories.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recclr.order import keyed_uniform

# Positions that no item has, for what a row draws once; a stretch of its own for the shuffle.
_CROP, _SPAN, _SHUFFLE = -2, -3, 1 << 32
# What a product of a share and a length may be off by.
_ROUNDING = 1e-9


def cropped(start: Tensor, stop: Tensor, keep: float, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """A stretch of each history that begins anywhere in it.

    Args:
        start, stop: int64 [M], where each begins and ends. seeds: int64 [M].
        keep: share of the items, in (0, 1], that is kept, rounded up.

    Returns:
        where each stretch begins and ends; empty for an empty history only.
    """
    length = (stop - start).clamp(min=0)
    kept = (length.double() * keep - _ROUNDING).ceil().long().clamp(min=0)
    start = start + _place(seeds, _CROP, length - kept)
    return start, start + kept


@dataclass(frozen=True)
class Shuffle:
    """What happens to the weights of the items of histories.

    Attributes:
        mask: probability that an item weighs nothing.
        reorder: share of a history, rounded down, in which the weights are shuffled.
    """

    mask: float
    reorder: float

    def flat(self, weights: Tensor, offsets: Tensor, owner: Tensor, seeds: Tensor) -> Tensor:
        """Weights float32 [n] of ragged rows, one after the other.

        Args:
            offsets: int64 [M + 1], where each row begins. owner: int64 [n], the row of each item.
            seeds: int64 [M].
        """
        begin, lengths = offsets[:-1], offsets.diff()
        positions = torch.arange(len(weights), device=weights.device) - begin[owner]
        if self.reorder:
            keys = self._keys(positions, lengths, seeds, owner) + begin[owner]
            weights = weights[keys.argsort()]
        return self._kept(weights, positions, seeds[owner])

    def padded(self, weights: Tensor, lengths: Tensor, seeds: Tensor) -> Tensor:
        """Weights float32 [M, W] of rows of int64 ``lengths`` [M]; what is beyond stays there."""
        positions = torch.arange(weights.shape[1], device=weights.device)[None]
        if self.reorder:
            owner = torch.arange(len(weights), device=weights.device)[:, None]
            order = self._keys(positions, lengths, seeds, owner).argsort(1)
            weights = weights.gather(1, order)
        return self._kept(weights, positions, seeds[:, None])

    def _keys(self, positions: Tensor, lengths: Tensor, seeds: Tensor, owner: Tensor) -> Tensor:
        """Where each item of a row goes, as float64 to sort by: within the span to any place."""
        span = (lengths.double() * self.reorder + _ROUNDING).floor().long()
        begin = _place(seeds, _SPAN, lengths - span)[owner]
        inside = (positions >= begin) & (positions < begin + span[owner])
        drawn = keyed_uniform(seeds[owner], positions + _SHUFFLE).double()
        return torch.where(inside, begin + span[owner] * drawn, positions.double())

    def _kept(self, weights: Tensor, positions: Tensor, seeds: Tensor) -> Tensor:
        return weights * (keyed_uniform(seeds, positions) >= self.mask)


def _place(seeds: Tensor, draw: int, most: Tensor) -> Tensor:
    """From 0 to ``most``, int64 [M], each as likely."""
    drawn = keyed_uniform(seeds, torch.full_like(seeds, draw)).double()
    return torch.minimum((drawn * (most + 1)).long(), most)
