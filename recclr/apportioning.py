"""Which items each of several ranks embeds.

Together the ranks need every item of a step once, and its gradient from all. Two ways to do that:
each embeds a share of all items and they give these to each other, with two exchanges (embeddings,
and their gradients); or each embeds for itself what its own rows score, and nothing is exchanged
but the gradients of tables and layers, as ever. The second embeds shared candidates once on each
rank, so it is taken where these are few beside a rank's own rows, or an embedding is a look-up.

Shape letters: U items of a step, V of them that a rank needs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from recclr.distributed import Ranks
from recclr.negatives import Candidates
from recclr.parts import IdPart
from recclr.sharded_tables import ShardedTable
from recclr.towers import Tower

# Of the rows of a rank: positives int64 [R], own negatives and further positives [R, M] or None.
Named = tuple[Tensor, Tensor | None, Tensor | None]

# With more ranks, gradients of every candidate from each of them outweigh an exchange of shares.
_FEW = 4


def is_lookup(tower: nn.Module) -> bool:
    """Whether a tower does nothing but look its id up, in a table that each rank has whole."""
    if not isinstance(tower, Tower) or len(tower.blocks):
        return False
    [*others, part] = tower.parts
    return not others and isinstance(part, IdPart) and not isinstance(part.table, ShardedTable)


def each_for_itself(
    ranks: Ranks, num_rows: int, num_candidates: int, item_tower: nn.Module
) -> bool:
    """Whether each rank embeds the items that its rows score; the same on all ranks.

    Args:
        num_rows: of the batch, of all ranks. num_candidates: that they share.
    """
    if ranks.size == 1:
        return False
    few = num_candidates <= num_rows // ranks.size
    return few or (ranks.size <= _FEW and is_lookup(item_tower))


def most_needed(ranks: Ranks, num_rows: int, candidates: Candidates, named: Named) -> int:
    """How many items no rank needs more of, where each embeds for itself; the same on all ranks."""
    width = sum(1 if rows.ndim == 1 else rows.shape[1] for rows in named if rows is not None)
    own = max(ranks.counts(num_rows)) * width
    return min(len(candidates.item_idx), len(candidates.log_weights) + own)


def needed(candidates: Candidates, named: Named) -> tuple[Tensor, Candidates, Named]:
    """What is left of the items of a step for some of its rows.

    Args:
        named: places among ``candidates.item_idx`` that the rows need beside the candidates;
            -1 for none, which stays as it is.

    Returns:
        places int64 [V], rising, of the items that are needed; the candidates with these alone,
        and without ``positive_row`` and ``own_row``, which were of all rows; ``named`` among them.
    """
    item_idx, chosen = candidates.item_idx, candidates.candidate_row
    if chosen is None:
        return torch.arange(len(item_idx), device=item_idx.device), candidates, named
    # One place more, for those that name none.
    wanted = torch.zeros(len(item_idx) + 1, dtype=torch.bool, device=item_idx.device)
    for places in (chosen, *named):
        if places is not None:
            wanted[places.reshape(-1)] = True
    wanted[-1] = False
    moved = wanted.cumsum(0) - 1
    kept = wanted[:-1].nonzero().squeeze(1)
    fewer = replace(
        candidates,
        item_idx=item_idx.index_select(0, kept),
        positive_row=kept[:0],
        candidate_row=moved.index_select(0, chosen),
        own_row=None,
    )
    positive_row, own_row, more_row = named
    positive_row = moved.index_select(0, positive_row)
    return kept, fewer, (positive_row, _moved(own_row, moved), _moved(more_row, moved))


def _moved(rows: Tensor | None, moved: Tensor) -> Tensor | None:
    return None if rows is None else torch.where(rows < 0, rows, moved[rows])
