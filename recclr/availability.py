"""Which items there were at a moment, and draws among these.

An item counts from its first train event on, or from some time before it. One that was launched
later was nobody's to refuse at the moment of the step; taken as a negative all the same, it learns
that it is disliked before it is seen, which is what an evaluation on later events then finds.

Without such a lead an item that has no history yet is only ever a positive, and where the towers
can tell that it has none (statistics, ids as of the moment) they learn that what is new is always
right. With one, what is about to be launched stands among the negatives as well.

Items in the order of their launch make "available at a moment" the first so many of them, so a draw
costs a binary search and its share of the available ones one look-up, whatever the catalogue.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recclr.data.log import EncodedLog
from recclr.errors import ConfigError

# Later than any event: the item has none.
_NEVER = 1 << 62
_STRETCH = 1 << 22


class Availability:
    """Items by their first event.

    Args:
        log: train rows, in memory or mapped.
        powers: float64 [num_items], what popularity draws in proportion to; 0 where an item has no
            train event. None where there are no such draws.
        lead_s: by how much sooner than its first event an item counts.

    Attributes:
        first_seen: int64 seconds [num_items], that moment; later than any event where an item has
            none.

    Raises:
        ConfigError: a log without time.
    """

    def __init__(self, log: EncodedLog, powers: Tensor | None = None, *, lead_s: int = 0) -> None:
        if log.timestamp is None:
            raise ConfigError(
                "negatives.available needs timestamps, and the log has none; name its column in "
                "data.columns.timestamp or leave negatives.available out"
            )
        first = _first_seen(log, log.timestamp).to(log.device)
        self.first_seen = torch.where(first < _NEVER, first - lead_s, first)
        self.launches, self.order = self.first_seen.sort(stable=True)
        self.powers = powers
        # Sums over the items launched so far, [num_items + 1].
        self.sums: Tensor | None = None
        if powers is not None:
            rising = powers.index_select(0, self.order).cumsum(0)
            self.sums = torch.cat([rising.new_zeros(1), rising])

    def of(self, item_idx: Tensor, at: Tensor) -> Tensor:
        """Whether each item counts strictly before ``at``, bool [M].

        Args:
            item_idx: int64 [M]. at: int64 seconds, scalar.
        """
        return self.first_seen.index_select(0, item_idx) < at

    def count(self, at: Tensor) -> Tensor:
        """How many items count strictly before ``at`` (int64 scalar), int64 scalar."""
        return torch.searchsorted(self.launches, at)

    def uniform(self, size: int, at: Tensor, generator: torch.Generator) -> Tensor:
        """Available items, each as likely, int64 [size]; the first of all where there are none,
        which ``of`` refuses.
        """
        count = self.count(at)
        points = torch.rand(size, generator=generator, device=at.device, dtype=torch.float64)
        return self.order[_below((points * count).long(), count)]

    def popular(self, size: int, at: Tensor, generator: torch.Generator) -> Tensor:
        """Available items in proportion to ``powers``, int64 [size]; as ``uniform`` without any."""
        assert self.sums is not None
        count = self.count(at)
        points = torch.rand(size, generator=generator, device=at.device, dtype=torch.float64)
        # A point above the last sum (rounding) would name an item that is not there yet.
        places = torch.searchsorted(self.sums, points * self._sum(count), right=True) - 1
        return self.order[_below(places, count)]

    def uniform_share(self, item_idx: Tensor, at: Tensor) -> Tensor:
        """Probability that a uniform draw is each item, float32 [M]; 0 for one not available."""
        share = 1.0 / self.count(at).clamp(min=1)
        return torch.where(self.of(item_idx, at), share, 0.0)

    def popular_share(self, item_idx: Tensor, at: Tensor) -> Tensor:
        """The same of a draw by popularity, float32 [M]."""
        assert self.powers is not None
        share = self.powers.index_select(0, item_idx) / self._sum(self.count(at)).clamp(min=1e-300)
        return torch.where(self.of(item_idx, at), share, 0.0).float()

    def _sum(self, count: Tensor) -> Tensor:
        """Of the powers of the first ``count`` (int64 scalar) items, float64 [1]."""
        assert self.sums is not None
        # An index of no dimensions would be read by the host, which a captured step must not do.
        return self.sums.index_select(0, count.view(1))


def _below(places: Tensor, count: Tensor) -> Tensor:
    """``places``, none at or above ``count`` nor below 0."""
    return torch.minimum(places, count - 1).clamp(min=0)


def _first_seen(log: EncodedLog, timestamp: Tensor) -> Tensor:
    """int64 seconds [num_items]: as ``statistics.TimeIndex`` has it, without sorting the log."""
    found = torch.full((log.num_items,), _NEVER, device=log.item_idx.device)
    for items, times in zip(
        torch.split(log.item_idx, _STRETCH), torch.split(timestamp, _STRETCH), strict=True
    ):
        found.scatter_reduce_(0, items.long(), times, "amin")
    return found
