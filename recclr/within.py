"""Negatives of the positive's own group, a category of items say.

Shape letters: B rows, C candidates, G groups that rows of a step are in.

What of B × C pairs is left out is most of them, so the mask has a bit for each: B·C / 8 bytes. It
also says which groups it was made of, by which the loss is computed in blocks where Triton's
kernels do not read the bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recclr.data.log import CategoricalColumn, FeatureTable
from recclr.errors import ConfigError
from recclr.kernels import BitMask, GroupMask, PairMask
from recclr.kernels.reference import WORD_BITS
from recclr.settings import NegativesSettings

_MAX_MASK_BYTES = 256 << 20
# Pairs of a group and a candidate that are compared at once.
_STRETCH = 1 << 22


class RoomError(ConfigError):
    """The pairs of a step are more than a mask of them may take."""


class SameGroup:
    """Hides candidates of other groups.

    Args:
        item_group: int64 [num_items] on the training device; 0 for an item without a group.
    """

    def __init__(self, item_group: Tensor) -> None:
        self.item_group = item_group

    def same(self, positives: Tensor, item_idx: Tensor) -> Tensor:
        """Bool [B, M]: items of a row that are of its positive's group, or the positive has none.

        Args:
            positives: int64 [B]. item_idx: int64 [B, M].
        """
        own = self.item_group.index_select(0, positives).unsqueeze(1)
        return (own == 0) | (own == self.item_group[item_idx])

    def limit(self, known: PairMask, positives: Tensor, candidate_idx: Tensor) -> GroupMask:
        """The mask of known positives and of all candidates outside the group of the row.

        Args:
            known: each pair once. positives: int64 [B]. candidate_idx: int64 [C], repeats allowed.

        Returns:
            no bit of a group for rows whose positive has none.
        """
        of_row = self.item_group.index_select(0, positives)
        of_candidate = self.item_group.index_select(0, candidate_idx)
        groups, inverse = torch.unique(of_row, return_inverse=True)
        words = torch.empty(
            (0, -(-len(candidate_idx) // WORD_BITS)), dtype=torch.int32, device=of_row.device
        )
        if len(groups):
            size = max(_STRETCH // max(len(candidate_idx), 1), 1)
            hidden = [_others(part, of_candidate).words for part in torch.split(groups, size)]
            words = torch.cat(hidden).index_select(0, inverse)
        # A bit that is set twice would be added twice.
        own = of_row.index_select(0, known.rows)
        kept = (own == 0) | (own == of_candidate.index_select(0, known.columns))
        rows, columns = known.rows[kept], known.columns[kept]
        places = rows * words.shape[1] + columns // WORD_BITS
        bits = torch.ones_like(columns) << (columns % WORD_BITS)
        # Bit 31 is the sign of a word: added up as int64, of which the cast keeps the lower half.
        summed = words.long().view(-1).scatter_add_(0, places, bits)
        known = PairMask(rows, columns)
        return GroupMask(summed.view_as(words).int(), of_row, of_candidate, known)


def _others(groups: Tensor, of_candidate: Tensor) -> BitMask:
    """Candidates outside each group; none of group 0."""
    hidden = groups[:, None] != of_candidate
    return BitMask.from_dense(hidden & (groups[:, None] > 0))


def item_groups(settings: NegativesSettings, items: FeatureTable) -> Tensor | None:
    """Group of every item as ``negatives.within`` has it, int64 [num_items]; None where not set.

    Raises:
        ConfigError: there is no such feature, or it is not categorical.
    """
    if settings.within is None:
        return None
    column = items.columns.get(settings.within)
    if isinstance(column, CategoricalColumn):
        return column.idx.long()
    fitting = [repr(n) for n, each in items.columns.items() if isinstance(each, CategoricalColumn)]
    what = "is not categorical" if column is not None else "is none of [item.features]"
    raise ConfigError(
        f"negatives.within = {settings.within!r} {what}; expected "
        f"{' or '.join(fitting) or 'a feature of kind categorical, of which there is none'}"
    )


def require_groups(
    settings: NegativesSettings,
    item_group: Tensor | None,
    *,
    num_rows: int,
    num_candidates: int,
) -> None:
    """Refuse groups that were not handed down, and a step whose pairs take too much memory.

    Args:
        num_rows: of a step, on this device. num_candidates: of a step, at most.

    Raises:
        ConfigError: ``item_group`` is None. RoomError: see above.
    """
    if item_group is None:
        raise ConfigError(
            f"negatives.within = {settings.within!r} needs the group of every item; give item_group"
        )
    taken = num_rows * num_candidates // 8
    if taken > _MAX_MASK_BYTES:
        raise RoomError(
            f"negatives.within hides candidates row by row: one bit for each of {num_rows:,} rows "
            f"and {num_candidates:,} candidates takes {taken:,} bytes, more than "
            f"{_MAX_MASK_BYTES:,}; lower train.batch_size or the number of negatives"
        )
