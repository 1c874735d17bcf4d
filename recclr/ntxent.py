"""NT-Xent, the loss of SimCLR: two views of one entity together, those of all others apart.

Shape letters: M entities, D dimension, P rows of one part, N pairs that are masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recclr.kernels import PairMask, masked_logsumexp, unit_rows


def nt_xent(
    z1_MD: Tensor,
    z2_MD: Tensor,
    temperature: float | Tensor,
    *,
    entity_idx: Tensor | None = None,
    part: tuple[int, int] | None = None,
) -> Tensor:
    """Mean over both views of all entities of -log(exp(s_ij / τ) / Σ_k exp(s_ik / τ)).

    Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations",
    eq. 1: i is one view, j the other view of the same entity, s the cosine, and k runs over all
    2·M views but i itself. An entity that stands in several rows is no negative of itself: of its
    views, a row meets its own pair only. Memory is that of ``masked_logsumexp``; the mask grows
    with Σ count² of the entities.

    Args:
        z1_MD, z2_MD: float [M, D], of any length; row m of both is the same entity.
        temperature: τ, above 0; may carry a gradient.
        entity_idx: int64 [M], who stands in each row; None where all differ.
        part: start and stop of the P rows whose terms are summed, where several ranks share them:
            the parts of all ranks add up to the mean. None for all rows.

    Returns:
        float32 scalar, at least 0; 0 where M is 0, or 1: then nothing is to be told apart.
    """
    num_rows = len(z1_MD)
    start, stop = (0, num_rows) if part is None else part
    views = unit_rows(torch.cat([z1_MD, z2_MD]))
    first, second = views[:num_rows], views[num_rows:]
    own = torch.cat([first[start:stop], second[start:stop]]) / temperature
    others = torch.cat([second[start:stop], first[start:stop]])
    partition = masked_logsumexp(
        own,
        views,
        views.new_zeros(2 * num_rows),
        _own_views(entity_idx, num_rows, start, stop, views.device),
    )
    losses = partition - (own * others).sum(1)
    return losses.sum() / max(2 * num_rows, 1)


def _own_views(
    entity_idx: Tensor | None, num_rows: int, start: int, stop: int, device: torch.device
) -> PairMask:
    """Pairs of views of one entity that are no pair of the loss; rows rise.

    Row r of the 2·P is the first view of row ``start + r`` below P, and the second one from P on.
    """
    if entity_idx is None:
        own = torch.arange(start, stop, device=device)
        numbers = torch.arange(2 * (stop - start), device=device)
        return PairMask(numbers, torch.cat([own, own + num_rows]))
    rows, columns = _same(entity_idx, start, stop)
    rest = columns != rows + start
    again, elsewhere = rows[rest], columns[rest]
    count = stop - start
    # A first view meets no first view, and of the second ones its own; a second view likewise.
    of = torch.cat([rows, again, again + count, rows + count])
    with_ = torch.cat([columns, elsewhere + num_rows, elsewhere, columns + num_rows])
    of, order = of.sort(stable=True)
    return PairMask(of, with_[order])


def _same(entity_idx: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Of each of the P rows, counted from 0, all of the M rows with its entity: int64 [N] each."""
    ordered, order = entity_idx.sort(stable=True)
    own = entity_idx[start:stop]
    low = torch.searchsorted(ordered, own)
    counts = torch.searchsorted(ordered, own, right=True) - low
    rows = torch.arange(len(own), device=own.device).repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    places = torch.arange(len(rows), device=own.device) - before[rows] + low[rows]
    return rows, order[places]
