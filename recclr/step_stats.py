"""What a step reports."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from recclr.losses import information_bound


@dataclass
class StepStats:
    """What a step reports: tensors so that reading them, a host sync, stays optional.

    Of several ranks ``loss`` is the part of one, and all parts sum up to the mean over positives;
    ``num_masked`` is likewise its own. ``exchange`` makes both those of the step. With fixed shapes
    counts that follow from draws are scalars on the device.

    Attributes:
        num_candidates: of each batch, on average. num_pairs: scored, masked ones included.
        num_masked: known positives, and items that were mined for the row.
        num_rows: positives. num_distinct: of their items, int64 scalar; the others are one
            candidate with one of these, counted as often as it was drawn.
        auxiliary: terms beside the main one, by name; ``loss`` has them, each times its weight.
        log_weights: float32 [C] of the candidates (of the last batch) where the loss is plain
            InfoNCE, None elsewhere.
    """

    loss: Tensor
    num_candidates: float | Tensor
    num_pairs: int | Tensor
    num_masked: int | Tensor
    num_rows: int
    num_distinct: Tensor
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    log_weights: Tensor | None = None

    @property
    def information(self) -> float | None:
        """What a query tells of its positive, in nats: see ``information_bound``.

        Masked pairs are counted as if they were like all others. None for a loss of which no bound
        follows. Waits for a GPU.
        """
        if self.log_weights is None:
            return None
        negatives = float(self.log_weights.exp().sum()) * (1 - self.masked_share)
        return information_bound(float(self.loss.detach()), 1 + negatives)

    @property
    def masked_share(self) -> float:
        """Share of the scored pairs that are masked, in [0, 1]. May wait for a GPU."""
        return int(self.num_masked) / max(int(self.num_pairs), 1)

    @property
    def duplicate_share(self) -> float:
        """Share of the rows whose item an earlier row has; as in-batch negatives they add nothing.

        Waits for a GPU.
        """
        return 1.0 - int(self.num_distinct) / max(self.num_rows, 1)


def joined(found: list[StepStats]) -> StepStats:
    """The batches of a step as one."""
    auxiliary = {
        name: torch.stack([stats.auxiliary[name] for stats in found]).sum()
        for name in found[0].auxiliary
    }
    return StepStats(
        torch.stack([stats.loss for stats in found]).sum(),
        sum(stats.num_candidates for stats in found) / len(found),
        sum(stats.num_pairs for stats in found),
        sum(stats.num_masked for stats in found),
        sum(stats.num_rows for stats in found),
        torch.stack([stats.num_distinct for stats in found]).sum(),
        auxiliary,
        log_weights=found[-1].log_weights,
    )
