"""Which candidates of a batch are interactions of the row's user.

Shape letters: B rows, C candidates, P pairs.

Two walks give the same pairs. From the rows: each user's items through an item -> candidate table,
O(Σ history of the batch). From the candidates: each item's users through a user -> rows table,
O(Σ audience of the candidates). With shared uniform negatives the second is ten times shorter
(Gowalla, B = 2048, C = 1024: 20 thousand entries against 200 thousand), with in-batch candidates
often the first, so each step takes the shorter one.

Pairs are as many as there are, and walks as long as they are, which the host has to know. Where it
must not wait for a GPU, ``bits`` gives the same as one bit for each row and candidate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from recclr.data.log import Csr, EncodedLog
from recclr.kernels import BitMask, PairMask, native
from recclr.kernels.native_pairs import known_of_candidates, known_of_rows


class KnownPositives:
    """All train interactions, from both sides.

    Args:
        log: train rows.
        only_own: mask each row's own positive only.
    """

    def __init__(self, log: EncodedLog, *, only_own: bool = False) -> None:
        device = log.device
        self.only_own = only_own
        self.item_slots = torch.full((log.num_items,), -1, dtype=torch.int64, device=device)
        if not only_own:
            # Each pair once, however often it was bought: shorter walks, and an honest count.
            self.user_items, self.item_users = log.known_pairs()
            self.user_lengths, self.item_lengths = (
                lists.lengths() for lists in (self.user_items, self.item_users)
            )
            self.user_slots = torch.full((log.num_users,), -1, dtype=torch.int64, device=device)

    def mask(
        self,
        user_idx: Tensor,
        positives: Tensor,
        candidate_idx: Tensor,
        *,
        also: Tensor | None = None,
    ) -> PairMask:
        """Every (row, candidate) pair that is a known positive, once, rows rising.

        Args:
            user_idx, positives: int64 [B]. candidate_idx: int64 [C], distinct.
            also: integer [num_users, W], further items of each user, distinct and none of them a
                known positive, -1 for none; O(B·W). None for none.
        """
        found = self._known(user_idx, positives, candidate_idx)
        return found if also is None else self._with_lists(found, also[user_idx], candidate_idx)

    def _with_lists(self, found: PairMask, lists: Tensor, candidate_idx: Tensor) -> PairMask:
        columns = self._slots_of(candidate_idx, lists.clamp(min=0).long().flatten())
        columns = torch.where(lists >= 0, columns.view(lists.shape), -1)
        rows, places = (columns >= 0).nonzero(as_tuple=True)
        listed = columns[rows, places]
        rows, order = torch.cat([found.rows, rows]).sort(stable=True)
        return PairMask(rows, torch.cat([found.columns, listed])[order])

    def _known(self, user_idx: Tensor, positives: Tensor, candidate_idx: Tensor) -> PairMask:
        if self.only_own:
            columns = self._slots_of(candidate_idx, positives)
            hit = (columns >= 0).nonzero().squeeze(1)
            return PairMask(hit, columns[hit])
        length = int(self.item_lengths.index_select(0, candidate_idx).sum())
        if int(self.user_lengths.index_select(0, user_idx).sum()) <= length:
            return self._from_rows(user_idx, candidate_idx)
        return self._from_candidates(user_idx, candidate_idx, length)

    def bits(
        self, user_idx: Tensor, positives: Tensor, candidate_idx: Tensor, places: Tensor | None
    ) -> tuple[BitMask, Tensor]:
        """The pairs of ``mask`` at a fixed shape, and their number, int64 scalar.

        Args:
            user_idx, positives: int64 [B]. candidate_idx: int64 [C].
            places: int64 [C], which column each candidate is masked in: its own or, where an item
                comes again, the one of its first time; -1 for none. None: its own.
        """
        if places is None:
            places = torch.arange(len(candidate_idx), device=candidate_idx.device)
        walk = self._walked_bits if user_idx.device.type == "cuda" else self._searched_bits
        return walk(user_idx, positives, candidate_idx, places)

    def _walked_bits(
        self, user_idx: Tensor, positives: Tensor, candidate_idx: Tensor, places: Tensor
    ) -> tuple[BitMask, Tensor]:
        from recclr.kernels.triton_known import known_bits_triton

        # Where an item comes again, the same is written to it again.
        self.item_slots.index_copy_(0, candidate_idx, places)
        if self.only_own:
            rows = torch.arange(len(positives) + 1, device=positives.device)
            lists, rows = Csr(rows, positives.int()), rows[:-1]
        else:
            lists, rows = self.user_items, user_idx
        bits, counts = known_bits_triton(
            lists.offsets, lists.values, rows, self.item_slots, len(candidate_idx)
        )
        self.item_slots.index_fill_(0, candidate_idx, -1)
        return bits, counts.sum()

    def _searched_bits(
        self, user_idx: Tensor, positives: Tensor, candidate_idx: Tensor, places: Tensor
    ) -> tuple[BitMask, Tensor]:
        """Looks up every pair, B·C searches: plain, for where Triton's walk cannot run."""
        own = places == torch.arange(len(places), device=places.device)
        if self.only_own:
            hidden = positives[:, None] == candidate_idx
        else:
            lists = self.user_items
            known = lists.row_numbers() * len(self.item_slots) + lists.values
            wanted = user_idx[:, None] * len(self.item_slots) + candidate_idx
            found = torch.searchsorted(known, wanted).clamp_(max=len(known) - 1)
            hidden = known[found] == wanted
        hidden = hidden & own
        return BitMask.from_dense(hidden), hidden.sum()

    def _from_rows(self, user_idx: Tensor, candidate_idx: Tensor) -> PairMask:
        kernels = native.usable(user_idx, candidate_idx)
        if kernels is not None:
            with self._slots(candidate_idx) as slots:
                return known_of_rows(kernels, user_idx, self.user_items, slots)
        histories = self.user_items.take(user_idx)
        columns = self._slots_of(candidate_idx, histories.values)
        hit = (columns >= 0).nonzero().squeeze(1)
        rows = torch.searchsorted(histories.offsets, hit, right=True) - 1
        return PairMask(rows, columns[hit])

    def _from_candidates(self, user_idx: Tensor, candidate_idx: Tensor, room: int = 0) -> PairMask:
        """The pairs, found in one walk where there are no more than ``room``."""
        kernels = native.usable(user_idx, candidate_idx)
        if kernels is not None:
            lists = self.item_users, self.user_slots
            return known_of_candidates(kernels, user_idx, candidate_idx, *lists, room=room)
        # A user may own several rows of the batch: rows sorted by user, one range each.
        order = torch.argsort(user_idx, stable=True)
        users, counts = torch.unique_consecutive(user_idx[order], return_counts=True)
        ends = counts.cumsum(0)
        self.user_slots[users] = torch.arange(len(users), device=users.device)
        audiences = self.item_users.take(candidate_idx)
        slots = self.user_slots.index_select(0, audiences.values)
        self.user_slots[users] = -1
        hit = (slots >= 0).nonzero().squeeze(1)
        columns = torch.searchsorted(audiences.offsets, hit, right=True) - 1
        slots = slots[hit]
        lengths = counts[slots]
        total = int(lengths.sum())
        first = (ends - counts)[slots] - (lengths.cumsum(0) - lengths)
        places = torch.arange(total, device=users.device)
        places += first.repeat_interleave(lengths, output_size=total)
        rows, by_row = order[places].sort()
        return PairMask(rows, columns.repeat_interleave(lengths, output_size=total)[by_row])

    def _slots_of(self, candidate_idx: Tensor, item_idx: Tensor) -> Tensor:
        """Place of each item among the candidates, -1 for none."""
        with self._slots(candidate_idx) as slots:
            return slots.index_select(0, item_idx)

    @contextmanager
    def _slots(self, candidate_idx: Tensor) -> Iterator[Tensor]:
        """Of every item its place among the candidates, int64 [num_items], -1 for none."""
        places = torch.arange(len(candidate_idx), device=candidate_idx.device)
        # However the block ends, none of these candidates is left to the next ones.
        try:
            self.item_slots[candidate_idx] = places
            yield self.item_slots
        finally:
            self.item_slots[candidate_idx] = -1
