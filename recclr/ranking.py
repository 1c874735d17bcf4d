"""The contract between whatever ranks items and whatever judges rankings.

Shape letters: Q queries, K cut-off, V corpus (all items).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from recclr.data.log import Csr


@dataclass(frozen=True)
class TopK:
    """Ranked items per query, best first; ties stand in order of item index.

    Attributes:
        item_idx: int64 [Q, K]; -1 where fewer than K candidates were left.
        scores: float32 [Q, K]; -inf where ``item_idx`` is -1.
    """

    item_idx: Tensor
    scores: Tensor

    def shifted(self, by: int) -> TopK:
        """As ranked in a corpus where ``by`` items come before these."""
        return TopK(self.item_idx + by * (self.item_idx >= 0), self.scores)


class Ranker(Protocol):
    """Ranks the whole corpus for any user; the model and every baseline are one."""

    name: str

    def top_k(
        self, user_idx: Tensor, k: int, *, seen: Csr | None = None, items: Tensor | None = None
    ) -> TopK:
        """Best ``k`` items of each query.

        Args:
            user_idx: int64 [Q]. At or above the log's ``num_users``: a user nothing is known of,
                who gets the ranker's answer to an empty history.
            k: number of items; may exceed the number of candidates (padded with -1).
            seen: Q rows of items to leave out, one row per *query* (not per user), or None.
            items: int64 [C], strictly rising: rank only these. None ranks the whole corpus.
        """
        ...
