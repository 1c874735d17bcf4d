"""What a step scores, as every loss gets it, and the loss of it.

Shape letters: B positives, U embedded items, C candidates, M negatives that a row has for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recclr.alignment import alignment_uniformity
from recclr.distributed import ALONE, Ranks
from recclr.kernels import Mask, total_contrastive_loss
from recclr.pair_losses import pair_loss
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
        similarity: of the embeddings, as in ``ModelSettings``.
        ranks: who share the batch; the rows are a part of its ``num_rows``, and the items all.
        batch_share: of the step's weight, where it has several batches.
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
    similarity: str = "cosine"
    ranks: Ranks = ALONE
    num_rows: int = 0
    batch_share: float | Tensor = 1.0

    def own_scores(self, queries: Tensor) -> Tensor | None:
        """Dot products of each row and the negatives it has for itself, float32 [B, M].

        Args:
            queries: float32 [B, D], perhaps divided by the temperature.

        Returns:
            None where no row has any.
        """
        if self.own_row is None or self.own_log_weights is None or not self.own_row.numel():
            return None
        vectors = self.items.index_select(0, self.own_row.reshape(-1))
        return (queries.unsqueeze(1) * vectors.view(*self.own_row.shape, -1)).sum(2)


def scored_loss(scored: Scored, loss: LossSettings, *, bfloat16: bool = False) -> Tensor:
    """The loss of a step, float32 scalar.

    Args:
        bfloat16: as ``total_contrastive_loss`` has it; losses of pairs multiply in float32.
    """
    if loss.kind == "alignment_uniformity":
        weight = 1.0 if loss.uniformity_weight is None else loss.uniformity_weight
        return alignment_uniformity(scored, weight)
    if loss.kind not in ("infonce", "full_softmax"):
        return pair_loss(scored, loss)
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
    scores = scored.own_scores(queries)
    if scores is None or scored.own_log_weights is None:
        return None
    logits = scores + scored.own_log_weights
    some = (scored.own_log_weights > -torch.inf).any(1)
    # The gradient of a logsumexp over nothing is no number; such a row is taken out before it.
    safe = torch.where(some.unsqueeze(1), logits, 0.0)
    return torch.where(some, safe.logsumexp(1), -torch.inf)
