"""How often items come among the positives, estimated from the batches so far.

Yi et al. (RecSys 2019, Algorithm 2) keep for each item the position A at which it last came and an
average B of the gaps between its occurrences; 1 / B is its share. Here positions count rows, not
batches, so that an item that comes several times in a batch is seen to; and the places are the
items themselves, not hashes of them: indices are dense, 24 bytes each beside an embedding, and no
two items ever share a place, which is what their several hash functions are there to mend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recclr.distinct import counted

# Weight of a gap in the average, once there were 1 / _RATE of them.
_RATE = 0.01


class StreamingShares:
    """Shares of the items among the positives of a stream of batches.

    The first 1 / ``rate`` gaps of an item are averaged evenly, as one gap of ``num_items`` (what it
    is if all items are alike) and those seen; from then on the latest one weighs ``rate``. The
    relative standard error of a gap's average over k occurrences of a stationary stream is thus
    about 1 / sqrt(k + 1), and never below sqrt(rate / 2), 7 %. An item that never came in t rows
    has a share of 1 / (num_items + t).

    Args:
        num_items, device: as in the log. rate: in (0, 1].

    Attributes:
        state: what a resumed run needs: ``rows`` int64 scalar, seen so far; ``last`` int64
            [num_items], rows seen when each item last came, itself included; ``times`` int64
            [num_items], how often it came; ``gap`` float64 [num_items], its average.
    """

    def __init__(self, num_items: int, device: torch.device, rate: float = _RATE) -> None:
        self.num_items, self.rate = num_items, rate
        self.state = {
            "rows": torch.zeros((), dtype=torch.int64, device=device),
            "last": torch.zeros(num_items, dtype=torch.int64, device=device),
            "times": torch.zeros(num_items, dtype=torch.int64, device=device),
            "gap": torch.full((num_items,), float(num_items), device=device, dtype=torch.float64),
        }

    def shares(self, item_idx: Tensor) -> Tensor:
        """Share of each item among the rows so far, float32 [M], in (0, 1].

        Args:
            item_idx: int64 [M].
        """
        gap = self.state["gap"].index_select(0, item_idx)
        never = self.state["times"].index_select(0, item_idx) == 0
        gap = torch.where(never, gap + self.state["rows"], gap)
        return (1.0 / gap.clamp(min=1.0)).float()

    @torch.no_grad()
    def add(self, item_idx: Tensor) -> None:
        """See the rows of a batch; shapes follow from that of the batch, and no GPU is waited for.

        The m occurrences of an item in it are one update, by their mean gap, of the weight that m
        have one after the other.

        Args:
            item_idx: int64 [B], repeats allowed.
        """
        rows, last, times, gap = (self.state[name] for name in ("rows", "last", "times", "gap"))
        came = counted(item_idx, self.num_items).index_select(0, item_idx).double()
        positions = rows + 1 + torch.arange(len(item_idx), device=item_idx.device)
        before = last.index_select(0, item_idx)
        last.scatter_reduce_(0, item_idx, positions, "amax")
        mean = (last.index_select(0, item_idx) - before) / came
        known = times.index_select(0, item_idx)
        evenly = came / (known + came + 1)
        weight = torch.maximum(evenly, 1 - (1 - self.rate) ** came)
        old = gap.index_select(0, item_idx)
        # Rows of one item write the same to the same place.
        gap.index_copy_(0, item_idx, old + weight * (mean - old))
        times.index_copy_(0, item_idx, known + came.long())
        rows.add_(len(item_idx))
