"""The item -> user direction: the same loss with sides swapped.

Shape letters: B positives, V distinct users of a batch, D dimension.

Each row's item is a query, and the users of the batch are its candidates (CLIP, Radford et al.
2021, has both directions at equal weight). What makes the user -> item direction right is done here
as well: each user is one candidate, however many rows are its own, weighted by rows over expected
rows; and all users who have the item in train are left out. So the sum over candidates estimates
that over all users with train rows. An item that several rows share is scored for each of them.

A row's own user enters with the row's own embedding, whose history lacks the item; a candidate with
that of its first row in the batch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from recclr.batches import Batch
from recclr.data.log import EncodedLog, Groups
from recclr.distinct import counted
from recclr.distributed import Ranks
from recclr.kernels.native_rows import unique
from recclr.known_positives import KnownPositives
from recclr.scoring import Scored, scored_loss
from recclr.settings import LossSettings


class Mirror:
    """The loss of a step with sides swapped.

    Args:
        log: train rows; expected counts come from these, or from the pool of a batch.
        loss: everything but ``top_k`` and ``positives`` holds for this direction too: it is items
            that are ranked, and a row has one user.
        ranks: who shares the step; embeddings of users are gathered as those of items are.
    """

    def __init__(self, log: EncodedLog, loss: LossSettings, *, ranks: Ranks) -> None:
        self.ranks = ranks
        self.settings = replace(loss, top_k=None, positives=1)
        self.num_users, self.num_rows = log.num_users, len(log)
        self.counts = log.user_counts().float()
        only_own = not loss.mask_known_positives
        self.known_users = KnownPositives(_swapped(log), only_own=only_own)

    def loss(self, scored: Scored, batch: Batch, *, bfloat16: bool = False) -> Tensor:
        """Of the item -> user direction, float32 scalar.

        Args:
            scored, batch: as ``swapped`` has them. bfloat16: as ``total_contrastive_loss`` has it.
        """
        return scored_loss(self.swapped(scored, batch), self.settings, bfloat16=bfloat16)

    def swapped(self, scored: Scored, batch: Batch) -> Scored:
        """What the item -> user direction scores.

        Args:
            scored: of this rank's rows. batch: of all ranks.

        Returns:
            the same rows and row weights; ``user_idx`` holds items and ``item_idx`` users.
        """
        num_rows = len(batch.user_idx)
        own_rows = slice(*self.ranks.part(num_rows))
        users = self.ranks.gather_rows(
            scored.queries, self.ranks.counts(num_rows), "user embeddings"
        )
        distinct, row_of = unique(batch.user_idx)
        draws = counted(row_of, len(distinct))
        first = torch.full_like(distinct, num_rows)
        numbers = torch.arange(num_rows, device=first.device)
        first.scatter_reduce_(0, row_of, numbers, "amin")
        # Of one row's other rows, as that row has them: see ``CandidateSampler``.
        corrections = self.settings.log_q_strength * self._expected(distinct, batch).log()
        positive_log_weights = None
        if self.settings.log_q == "classic":
            positive_log_weights = -corrections[row_of[own_rows]].unsqueeze(1)
        return replace(
            scored,
            queries=scored.items.index_select(0, scored.positive_row),
            items=users,
            user_idx=scored.item_idx,
            item_idx=scored.user_idx,
            positive_row=numbers[own_rows],
            candidates=users.index_select(0, first),
            log_weights=draws.log() - corrections,
            mask=self.known_users.mask(scored.item_idx, scored.user_idx, distinct),
            own_row=None,
            own_log_weights=None,
            more_row=None,
            positive_log_weights=positive_log_weights,
        )

    def _expected(self, user_idx: Tensor, batch: Batch) -> Tensor:
        """Expected rows of each user among the others of a batch, float32 [V]."""
        counts, num_rows = self.counts, self.num_rows
        if batch.user_pool is not None:
            counts = counted(batch.user_pool.long(), self.num_users)
            num_rows = len(batch.user_pool)
        others = (len(batch.user_idx) - 1) / max(num_rows - 1, 1)
        return (others * counts[user_idx]).clamp_min(1e-12)


def _swapped(log: EncodedLog) -> EncodedLog:
    """Users for items and items for users."""
    groups = Groups(known_items=log.groups.known_users, known_users=log.groups.known_items)
    return EncodedLog(
        log.item_idx,
        log.user_idx,
        num_users=log.num_items,
        num_items=log.num_users,
        mapped_for=log.mapped_for,
        groups=groups,
    )
