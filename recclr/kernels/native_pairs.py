"""Known positives among candidates by the compiled kernels (``native``): two walks of lists.

Shape letters: B rows, C candidates.
"""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from recclr.data.log import Csr
from recclr.kernels.native import address, longs, threads_for
from recclr.kernels.reference import PairMask

# What a row's list costs, in multiply-adds: some thirty entries from anywhere in memory.
_WORK = 64


def known_of_rows(kernels: CDLL, user_idx: Tensor, user_items: Csr, item_slots: Tensor) -> PairMask:
    """Pairs of each row with those of its user's items that have a slot.

    Args:
        user_idx: int64 [B]. item_slots: int64 [num_items], place among the candidates or -1.
    """
    users, items = user_idx.contiguous(), user_items.values.int().contiguous()
    starts, threads = users.new_empty(len(users) + 1), threads_for(_WORK * len(users))

    def walk(*out: Tensor | None) -> int:
        lists = *longs(users, user_items.offsets), address(items, torch.int32)
        out_and_slots = longs(item_slots, starts, *out)
        return int(kernels.recclr_known_of_rows(len(users), *lists, *out_and_slots, threads))

    # Once to count and once to write.
    total = walk(None, None)
    pairs = users.new_empty((2, total))
    walk(*pairs)
    return PairMask(*pairs)


def known_of_candidates(
    kernels: CDLL,
    user_idx: Tensor,
    candidate_idx: Tensor,
    item_users: Csr,
    user_slots: Tensor,
    *,
    room: int,
) -> PairMask:
    """The same from the users of each candidate.

    Args:
        candidate_idx: int64 [C]. user_slots: int64 [num_users], -1 everywhere, as it is left.
        room: how many pairs there may be without a second walk.
    """
    users, items = user_idx.contiguous(), candidate_idx.contiguous()
    audience, next_row = item_users.values.int().contiguous(), torch.empty_like(users)
    starts = users.new_empty(len(users) + 1)
    while True:
        keys, *pairs = users.new_empty((3, room))
        found = kernels.recclr_known_of_candidates(
            len(users),
            *longs(users),
            len(items),
            *longs(items, item_users.offsets),
            address(audience, torch.int32),
            *longs(user_slots, next_row, starts),
            room,
            *longs(keys, *pairs),
        )
        if found <= room:
            return PairMask(*(each[:found] for each in pairs))
        room = found
