"""What a step scores, as every loss gets it, and the loss of it.

Shape letters: B positives, U embedded items, C candidates, M negatives that a row has for itself,
P positives of a row, at most.

With one positive and equal negatives the loss comes with its gradient in one pass
(``kernels.total_contrastive_loss``). Several positives compose it from a log-sum-exp, hardness
from three. On one CPU core, B = 2,048, C = 3,000, D = 64: some 70 ms in one pass, 80 with three
positives, 140 with the weights of SL@K, 160 with hardness.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recclr.alignment import alignment_uniformity
from recclr.distributed import ALONE, Ranks
from recclr.kernels import Mask, either, masked_logsumexp, total_contrastive_loss
from recclr.losses import contrastive_loss, products_of_own
from recclr.pair_losses import pair_loss
from recclr.quantiles import top_k_weights
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
        row_weights: float32 [B]; sums to 1 over the step, of time cells over an epoch on average.
        own_row: int64 [B, M], rows of ``items`` that are negatives of one row alone; None for none.
        own_log_weights: float32 [B, M]; -inf where a row has fewer.
        more_row: int64 [B, P - 1], rows of ``items`` that are further positives of a row; -1 where
            it has fewer. None for none. No positive of a row may be one of its negatives.
        positive_log_weights: float32 [B, P], what the logits of positives are moved by, minus the
            log of their expected counts in the classic form; None for nothing.
        similarity: of the embeddings, as in ``ModelSettings``.
        ranks: who share the batch; the rows are a part of its ``num_rows``.
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
    more_row: Tensor | None = None
    positive_log_weights: Tensor | None = None
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
        return products_of_own(queries, self.items, self.own_row)


def scored_loss(scored: Scored, loss: LossSettings, *, bfloat16: bool = False) -> Tensor:
    """The loss of a step, float32 scalar.

    With several positives that of a row is the mean of theirs, each against the same negatives
    (L_out of Khosla et al. 2020, with the other positives left out of the denominator).

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
    logits = (queries * positives).sum(1)
    second_temperature = 1.0 if loss.decoupled else loss.second_temperature
    if loss.hardness == 0 and scored.more_row is None:
        weights = scored.row_weights
        if loss.top_k is not None:
            weights = weights * _top_k_weights(scored, loss, logits.unsqueeze(1)).squeeze(1)
        if scored.positive_log_weights is not None:
            logits = logits + scored.positive_log_weights.squeeze(1)
        return total_contrastive_loss(
            queries,
            scored.candidates,
            scored.log_weights,
            logits,
            weights,
            scored.mask,
            own_partition=own_partition(scored, queries),
            second_temperature=second_temperature,
            bfloat16=bfloat16,
        )
    logits_BP, weights_BP = _several(scored, queries, logits)
    if loss.top_k is not None:
        weights_BP = weights_BP * _top_k_weights(scored, loss, logits_BP)
    if scored.positive_log_weights is not None:
        logits_BP = logits_BP + scored.positive_log_weights
    partition = hardened_partition(scored, queries, loss.hardness, bfloat16=bfloat16)
    losses = contrastive_loss(
        logits_BP.reshape(-1),
        partition.unsqueeze(1).expand_as(logits_BP).reshape(-1),
        second_temperature=second_temperature,
    )
    return (losses * weights_BP.reshape(-1)).sum()


def loss_with_queue(
    scored: Scored, fresh: Scored, loss: LossSettings, *, bfloat16: bool = False
) -> Tensor:
    """The loss against candidates of which some pass no gradient on, float32 scalar.

    Its value, and its gradient by queries and temperature, are those against all candidates. Its
    gradient by items is that against the fresh ones alone, under their own weights. With one
    denominator for both, an item would be pushed by what is left of its weight after its places in
    the queue have taken theirs: of a popular one, which fills the queue, next to nothing, while as
    a positive it is pulled in full.

    Args:
        scored: with all candidates. fresh: the same rows with those that have a gradient.
    """
    for_queries = replace(
        scored, items=scored.items.detach(), candidates=scored.candidates.detach()
    )
    for_items = replace(
        fresh, queries=fresh.queries.detach(), temperature=fresh.temperature.detach()
    )
    total = scored_loss(for_queries, loss, bfloat16=bfloat16)
    by_items = scored_loss(for_items, loss, bfloat16=bfloat16)
    return total + (by_items - by_items.detach())


def _several(scored: Scored, queries: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of all positives of each row, and what their losses count, float32 [B, P] each."""
    logits_BP, alive = logits.unsqueeze(1), torch.ones_like(logits, dtype=torch.bool).unsqueeze(1)
    if scored.more_row is not None:
        more = products_of_own(queries, scored.items, scored.more_row.clamp(min=0))
        some = scored.more_row >= 0
        logits_BP = torch.cat([logits_BP, more.where(some, 0.0)], 1)
        alive = torch.cat([alive, some], 1)
    return logits_BP, alive * (scored.row_weights / alive.sum(1)).unsqueeze(1)


def _top_k_weights(scored: Scored, loss: LossSettings, logits_BP: Tensor) -> Tensor:
    """What SL@K makes each positive count, float32 [B, P]; see ``quantiles``."""
    assert loss.top_k is not None
    own = None
    if scored.own_row is not None and scored.own_log_weights is not None:
        own = scored.items, scored.own_row, scored.own_log_weights
    return top_k_weights(
        logits_BP * scored.temperature,
        scored.queries,
        scored.candidates,
        scored.log_weights,
        scored.mask,
        own,
        top_k=loss.top_k,
        temperature=loss.top_k_temperature,
    )


def hardened_partition(
    scored: Scored, queries: Tensor, hardness: float, *, bfloat16: bool = False
) -> Tensor:
    """Log of the sum over a row's negatives, of which hard ones count more, float32 [B].

    Robinson et al. 2021: with ω the weight of a candidate and s its logit, each exp(s) is
    multiplied by exp(hardness·s) over the ω-weighted mean of that, so that the sum is
    Σ ω·exp((1 + hardness)·s) · Σ ω / Σ ω·exp(hardness·s). The gradient flows through the weights
    too, as in the authors' code. Of false negatives they correct (their τ⁺) those that are known
    are masked here, and others are not.

    Args:
        queries: float32 [B, D], divided by the temperature. hardness: at least 0; with 0 this is
            the plain sum. bfloat16: as ``masked_logsumexp`` has it.

    Returns:
        -inf, with zero gradient, where a row has no negatives.
    """
    plain = _partition(scored, queries * (1 + hardness), bfloat16=bfloat16)
    if hardness == 0:
        return plain
    some = plain > -torch.inf
    by_weight = _partition(scored, queries * hardness, bfloat16=bfloat16)
    # With all logits 0 this is the log of Σ ω, for which one column of zeros does.
    flat = replace(
        scored, candidates=scored.candidates.detach()[:, :1], items=scored.items.detach()[:, :1]
    )
    shift = _partition(flat, torch.zeros_like(queries[:, :1])) - by_weight.where(some, 0.0)
    return torch.where(some, plain + shift.where(some, 0.0), -torch.inf)


def _partition(scored: Scored, queries: Tensor, *, bfloat16: bool = False) -> Tensor:
    """Log of the weighted sum over all negatives of each row, float32 [B]."""
    shared = masked_logsumexp(
        queries, scored.candidates, scored.log_weights, scored.mask, bfloat16=bfloat16
    )
    own = own_partition(scored, queries)
    return shared if own is None else either(shared, own)


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
