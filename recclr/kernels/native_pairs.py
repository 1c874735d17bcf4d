"""Known positives among candidates by the compiled kernels (``native``): two walks of lists.

Shape letters: B rows, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL

import torch
from torch import Tensor

from recclr.data.log import Csr
from recclr.kernels.native import address
from recclr.kernels.reference import PairMask


def known_of_rows(kernels: CDLL, user_idx: Tensor, user_items: Csr, item_slots: Tensor) -> PairMask:
    """Pairs of each row with those of its user's items that have a slot.

    Args:
        user_idx: int64 [B]. item_slots: int64 [num_items], place among the candidates or -1.
    """
    given = [user_idx.contiguous(), user_items.offsets, user_items.values.int(), item_slots]
    threads = torch.get_num_threads()

    def walk(*out: Tensor | None) -> int:
        arrays = (address(x) for x in (*given, *out))
        return int(kernels.recclr_known_of_rows(len(user_idx), *arrays, threads))

    return _pairs(user_idx, walk)


def known_of_candidates(
    kernels: CDLL, user_idx: Tensor, candidate_idx: Tensor, item_users: Csr, user_slots: Tensor
) -> PairMask:
    """The same from the users of each candidate.

    Args:
        candidate_idx: int64 [C]. user_slots: int64 [num_users], -1 everywhere, as it is left.
    """
    users, items = user_idx.contiguous(), candidate_idx.contiguous()
    lists = item_users.offsets, item_users.values.int(), user_slots, torch.empty_like(users)

    def walk(*out: Tensor | None) -> int:
        arrays = (address(x) for x in (items, *lists, *out))
        sizes = len(users), address(users), len(items)
        return int(kernels.recclr_known_of_candidates(*sizes, *arrays))

    return _pairs(user_idx, walk)


def _pairs(user_idx: Tensor, walk: Callable[..., int]) -> PairMask:
    """Walked once to count and once to write."""
    starts = user_idx.new_empty(len(user_idx) + 1)
    total = walk(starts, None, None)
    rows, columns = user_idx.new_empty(total), user_idx.new_empty(total)
    walk(starts, rows, columns)
    return PairMask(rows, columns)
