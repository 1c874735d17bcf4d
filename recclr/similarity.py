"""Similarities as dot products: what a tower's output becomes, in training and in a store.

Shape letters: M rows, D dimension of a tower's output.

Every kernel, the exact search and every store multiply; so a similarity is two maps, one for each
side, after which the dot product is the score.

* ``cosine``: both sides scaled to length 1.
* ``dot``: as they are.
* ``euclidean``: the score is -‖u - v‖² = ⟨2u, v⟩ - ‖v‖² - ‖u‖², the dot product of
  [2u, -1, -‖u‖²] and [v, ‖v‖², 1] (the lift of nearest neighbours to inner products, the other way
  about than Bachrach et al., RecSys 2014). Squared, because the distance itself is no dot product
  of anything and orders items in the same way. Two more coordinates are exact wherever dot products
  are; a metric of the store's own would be needed only by a store that has no other. The plain
  vectors are the first D coordinates of an item, and half of those of a user.

The lift subtracts numbers of the size of the squared lengths, so scores carry their rounding, 2^-23
of them, and vectors much longer than their distances lose digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recclr.kernels import unit_rows

LIFTED = {"cosine": 0, "dot": 0, "euclidean": 2}
"""Similarities, and by how many coordinates their vectors exceed a tower's output."""


def as_queries(x: Tensor, similarity: str) -> Tensor:
    """Vectors whose dot product with those of ``as_candidates`` is the score.

    Args:
        x: float [M, D], what a tower came to. M may be 0.

    Returns:
        float32 [M, D] for ``cosine``; as they are for ``dot``; float32 [M, D + 2], [2u, -1, -‖u‖²],
        for ``euclidean``.
    """
    if similarity != "euclidean":
        return unit_rows(x) if similarity == "cosine" else x
    # Squares of rounded numbers would be off by more than near distances differ.
    x = x.float()
    squares = x.square().sum(1, keepdim=True)
    return torch.cat([2 * x, torch.full_like(squares, -1.0), -squares], 1)


def as_candidates(x: Tensor, similarity: str) -> Tensor:
    """As ``as_queries`` for the other side: [v, ‖v‖², 1] for ``euclidean``."""
    if similarity != "euclidean":
        return as_queries(x, similarity)
    x = x.float()
    squares = x.square().sum(1, keepdim=True)
    return torch.cat([x, squares, torch.ones_like(squares)], 1)


def with_bias(queries: Tensor, candidates: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors whose dot product is the score plus a number of the candidate.

    Args:
        queries: float32 [Q, D]. candidates: float32 [V, D]. bias: float32 [V].

    Returns:
        [queries, 1] and [candidates, bias], each with one more coordinate.
    """
    ones = torch.ones_like(queries[:, :1])
    return torch.cat([queries, ones], 1), torch.cat([candidates, bias.unsqueeze(1)], 1)


def log_popularity(counts: Tensor) -> Tensor:
    """Log of each item's share of the interactions, float32 [V], below 0.

    Each item is given one interaction more than it has, so that one without any has a logarithm.

    Args:
        counts: int64 [V], interactions in train.
    """
    more = counts.double() + 1
    return (more / more.sum()).log().float()
