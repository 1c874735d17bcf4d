"""Distinct values at a fixed shape: how many there are never reaches the host.

``torch.unique`` gives as many values as there are, which a GPU has to be waited for, and which no
CUDA graph can hold. Here places are as many as values could be: the U distinct ones, rising, and
then the last of them again. Whoever writes by them writes the same to the same place again, in
whatever order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distinct:
    """M values, at least one, sorted out into K places.

    Attributes:
        values: [K], the U distinct ones, rising, then the last of them K - U times.
        places: int64 [K], where each of ``values`` stands first: 0, …, U - 1, then U - 1.
        order: int64 [M], which sorts what was given; equal values keep their order.
        groups: int64 [M], the place in ``values`` of each given value, in that order.
    """

    values: Tensor
    places: Tensor
    order: Tensor
    groups: Tensor

    def inverse(self) -> Tensor:
        """Where each given value stands in ``values``, int64 [M], below U."""
        return torch.empty_like(self.groups).scatter_(0, self.order, self.groups)

    def starts(self) -> Tensor:
        """Where each group begins in ``order``, int64 [K]; M for the K - U that do not exist."""
        return torch.searchsorted(self.groups, _numbers(self.places))


def padded_distinct(given: Tensor, most: int) -> Distinct:
    """Sort out ``given``, int64 [M] with M >= 1, of which no more than ``most`` differ.

    There are K = min(M, most) places.
    """
    ordered, order = given.sort(stable=True)
    changes = torch.zeros_like(ordered)
    torch.ne(ordered[1:], ordered[:-1], out=changes[1:])
    groups = changes.cumsum(0)
    places = torch.minimum(_numbers(groups[:most]), groups[-1])
    return Distinct(ordered[torch.searchsorted(groups, places)], places, order, groups)


def counted(places: Tensor, size: int) -> Tensor:
    """How often each of ``range(size)`` comes, float32 [size]; exact up to 2^24.

    ``torch.bincount`` looks for the largest first, for which a GPU has to be waited for.

    Args:
        places: int64 [n] below ``size``.
    """
    found = torch.zeros(size, device=places.device)
    return found.scatter_add_(0, places, found.new_ones(1).expand(len(places)))


def _numbers(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)
