"""What a step scores, as every loss gets it, and the loss of it.

Shape letters: B positives, U embedded items, C candidates, M negatives that a row has for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recclr.kernels import Mask, total_contrastive_loss
from recclr.settings import LossSettings


@dataclass(frozen=True)
class Scored:
    """Embeddings of a step, and who is whose negative.

    Attributes:
        queries: float32 [B, D], not divided by the temperature. items: float32 [U, D].
        temperature: scalar.
        user_idx, item_idx: int64 [B], of the positive pairs.
        positive_row: int64 [B], where in ``items`` each positive stands.
        candidates: float32 [C, D]. log_weights: float32 [C], log of draws over expected count.
        mask: pairs of row and candidate that take no part.
        row_weights: float32 [B]; sums to 1 over the step.
        own_row: int64 [B, M], rows of ``items`` that are negatives of one row alone; None for none.
        own_log_weights: float32 [B, M]; -inf where a row has fewer.
    """

    queries: Tensor
    items: Tensor
    temperature: Tensor
    user_idx: Tensor
    item_idx: Tensor
    positive_row: Tensor
    candidates: Tensor
    log_weights: Tensor
    mask: Mask
    row_weights: Tensor
    own_row: Tensor | None = None
    own_log_weights: Tensor | None = None


def scored_loss(scored: Scored, loss: LossSettings, *, bfloat16: bool = False) -> Tensor:
    """The loss of a step, float32 scalar.

    Args:
        bfloat16: as ``total_contrastive_loss`` has it.
    """
    queries = scored.queries / scored.temperature
    positives = scored.items.index_select(0, scored.positive_row)
    return total_contrastive_loss(
        queries,
        scored.candidates,
        scored.log_weights,
        (queries * positives).sum(1),
        scored.row_weights,
        scored.mask,
        own_partition=own_partition(scored, queries),
        second_temperature=loss.second_temperature,
        bfloat16=bfloat16,
    )


def own_partition(scored: Scored, queries: Tensor) -> Tensor | None:
    """Log of the weighted sum over the negatives that each row has for itself, float32 [B].

    Args:
        queries: float32 [B, D], divided by the temperature.

    Returns:
        None where no row has any; -inf, with zero gradient, for rows without.
    """
    if scored.own_row is None or scored.own_log_weights is None or not scored.own_row.numel():
        return None
    vectors = scored.items.index_select(0, scored.own_row.reshape(-1))
    vectors = vectors.view(*scored.own_row.shape, -1)
    logits = (queries.unsqueeze(1) * vectors).sum(2) + scored.own_log_weights
    some = (scored.own_log_weights > -torch.inf).any(1)
    # The gradient of a logsumexp over nothing is no number; such a row is taken out before it.
    safe = torch.where(some.unsqueeze(1), logits, 0.0)
    return torch.where(some, safe.logsumexp(1), -torch.inf)
