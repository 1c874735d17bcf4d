"""Alignment and uniformity: positives together, everything else apart, without negatives.

Shape letters: B rows of a batch on all ranks, R on this one, D dimension.

Σ weight·‖u - i‖² + γ / 2·(U(users) + U(items)), with U(x) = log of the mean of exp(-2·‖x - x'‖²)
over the pairs of the batch (Wang and Isola, ICML 2020; as a recommender's whole loss: DirectAU,
Wang et al., KDD 2022). Pairs of one user, or one item, are left out: their distance says nothing,
and in a batch with a popular item they would be most of the mean.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recclr.distributed import Ranks
from recclr.kernels import PairMask, masked_logsumexp

if TYPE_CHECKING:
    from recclr.scoring import Scored

_T = 2.0


def alignment_uniformity(scored: Scored, weight: float) -> Tensor:
    """The loss of a step, float32 scalar; of several ranks the part of this one.

    Args:
        scored: with unit vectors. weight: γ.
    """
    ranks, counts = scored.ranks, scored.ranks.counts(scored.num_rows)
    positives = scored.items.index_select(0, scored.positive_row)
    alignment = ((scored.queries - positives).square().sum(1) * scored.row_weights).sum()
    spread = torch.zeros_like(alignment)
    for name, own, entities in (
        ("user", scored.queries, scored.user_idx),
        ("item", positives, scored.item_idx),
    ):
        spread = spread + uniformity(own, entities, ranks, counts, name)
    # Every rank has the whole of it, and their parts are summed.
    share = scored.batch_share / ranks.size
    return alignment + 0.5 * weight * share * spread


def uniformity(
    own: Tensor, entities: Tensor, ranks: Ranks, counts: list[int], name: str = "row"
) -> Tensor:
    """Log of the mean of exp(-2·‖x - x'‖²) over pairs of different entities, float32 scalar.

    0 where all rows are of one entity. The same on all ranks, each of which works on the pairs of
    its own rows.

    Args:
        own: float32 [R, D], unit vectors. entities: int64 [R], whose each row is.
        counts: R of each rank. name: for messages.
    """
    every = ranks.gather_rows(own, counts, f"{name} embeddings of the batch")
    whose = ranks.gather(entities, counts, f"{name}s of the batch")
    ordered, order = whose.sort(stable=True)
    first = torch.searchsorted(ordered, entities)
    lengths = torch.searchsorted(ordered, entities, right=True) - first
    _, sizes = torch.unique_consecutive(ordered, return_counts=True)
    num_pairs = len(whose) ** 2 - int(sizes.square().sum())
    if not num_pairs:
        return own.new_zeros(())
    rows = torch.arange(len(own), device=own.device).repeat_interleave(lengths)
    places = torch.arange(len(rows), device=own.device)
    places += (first - lengths.cumsum(0) + lengths).repeat_interleave(lengths)
    # exp(-2·‖x - y‖²) = exp(4·⟨x, y⟩ - 4) between unit vectors.
    sums = masked_logsumexp(
        2 * _T * own, every, own.new_zeros(len(every)), PairMask(rows, order[places])
    )
    sums = ranks.gather_rows(sums, counts, f"uniformity of {name}s")
    return sums.logsumexp(0) - 2 * _T - math.log(num_pairs)
