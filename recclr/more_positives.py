"""Further positives of a row: other items that its user has in train.

Shape letters: B rows, P positives of a row, its own among them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from recclr.batches import Batch
from recclr.data.log import Csr
from recclr.kernels.native_rows import unique
from recclr.negatives import Candidates


class MorePositives:
    """Draws them from lists of distinct items, rising in each.

    Args:
        user_items: of each user. num_more: P - 1, at least 1.
    """

    def __init__(self, user_items: Csr, num_more: int) -> None:
        self.user_items, self.num_more = user_items, num_more
        longest = int(user_items.lengths().amax()) if user_items.num_rows else 0
        self.num_halvings = longest.bit_length()

    def draw(self, batch: Batch, draws: torch.Generator) -> Tensor:
        """Each row's item, then others of its user: drawn without replacement, all sets alike.

        By Floyd's algorithm (Bentley and Floyd 1987), all rows at once: O(B·P²) whatever the
        length of the lists.

        Args:
            batch: rows whose pairs of user and item are in the lists.

        Returns:
            int64 [B, P]; -1 where a user has fewer.
        """
        lists, num_more = self.user_items, self.num_more
        user_idx, item_idx = batch.user_idx, batch.item_idx
        start, stop = lists.offsets[user_idx], lists.offsets[user_idx + 1]
        own, num_others = self._place(start, stop, item_idx), stop - start - 1
        size = (num_more, len(user_idx))
        points = torch.rand(size, generator=draws, device=user_idx.device, dtype=torch.float64)
        picked = torch.full((len(user_idx), num_more), -1, device=user_idx.device)
        for number in range(num_more):
            last = num_others - num_more + number
            pick = (points[number] * (last + 1)).long()
            pick = torch.where((picked == pick.unsqueeze(1)).any(1), last, pick)
            picked[:, number] = torch.where(last >= 0, pick, -1)
        places = start.unsqueeze(1) + picked.clamp(min=0)
        # The row's own item is skipped: whatever stands from there on moves up by one.
        places += places >= own.unsqueeze(1)
        # Of a user without any other item that leads past the list.
        items = lists.values[places.clamp(max=len(lists.values) - 1)].long()
        return torch.cat([item_idx.unsqueeze(1), items.masked_fill_(picked < 0, -1)], 1)

    def _place(self, start: Tensor, stop: Tensor, item_idx: Tensor) -> Tensor:
        """Where each item stands in its list, by bisection, int64 [B]."""
        values, low, high = self.user_items.values, start, stop
        for _ in range(self.num_halvings):
            middle = (low + high) // 2
            below = values[middle.clamp(max=len(values) - 1)] < item_idx
            below &= low < high
            low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
        return low


def with_items(candidates: Candidates, item_idx: Tensor) -> tuple[Candidates, Tensor]:
    """The same candidates with further items to encode, which are nobody's negatives by that.

    Args:
        candidates: without ``places``. item_idx: int64 of any shape; -1 for none.

    Returns:
        the candidates; where each item stands in their ``item_idx``, -1 for none.
    """
    assert candidates.places is None, "places are those of fixed shapes"
    some = item_idx >= 0
    count = len(candidates.item_idx)
    merged, places = unique(torch.cat([candidates.item_idx, item_idx[some]]))
    rows = torch.full_like(item_idx, -1)
    rows[some] = places[count:]
    if len(merged) == count:
        # All were there, as in the full softmax; ``item_idx`` rises, so nothing moved.
        return candidates, rows
    moved, chosen = places[:count], candidates.candidate_row
    wider = replace(
        candidates,
        item_idx=merged,
        positive_row=moved[candidates.positive_row],
        candidate_row=moved if chosen is None else moved[chosen],
        own_row=None if candidates.own_row is None else moved[candidates.own_row],
    )
    return wider, rows
