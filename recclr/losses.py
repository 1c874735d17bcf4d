"""Objectives over scores that are already divided by the temperature.

Shape letters: B queries (positives), C candidates.

With s the positive logit and Z = log Σ_j exp(logit_j - log_q_j) over candidates that are no known
positives of the row (``kernels.masked_logsumexp``):

* InfoNCE / sampled softmax: log(exp(s) + exp(Z)) - s. The positive is in the denominator with
  probability 1 and gets no correction; Z estimates the rest of the full softmax over the items that
  are not known positives, without bias in exp(Z). Khrylchenko et al. (RecSys 2025) write the
  same gradient as that of sg(1 - p)·(Z - s), with p the probability of the positive.
* The classic form (Yi et al. 2019): the same with s - log_q of the positive in place of s, as if
  it had been sampled too. Biased: a popular positive is told that it is likely enough.
* DCL (Yeh et al. 2022): Z - s. The positive is left out of the denominator.
* BSL (Wu et al. 2024): t₂·Z - s. As DCL, with the denominator raised to the power t₂, the ratio of
  the two temperatures; DCL is t₂ = 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recclr.errors import ShapeError


def contrastive_loss(
    positive_logits_B: Tensor, log_partition_B: Tensor, *, second_temperature: float | None = None
) -> Tensor:
    """Loss of each row, float32 [B].

    Args:
        positive_logits_B: similarity / temperature of the positive pair, [B].
        log_partition_B: log of the weighted sum over negatives, [B]; -inf where a row has none,
            which then costs nothing (InfoNCE) or only pulls its positive (BSL).
        second_temperature: BSL exponent; None for InfoNCE.
    """
    if positive_logits_B.shape != log_partition_B.shape or positive_logits_B.ndim != 1:
        raise ShapeError(
            f"expected two vectors of one length, found {tuple(positive_logits_B.shape)} and "
            f"{tuple(log_partition_B.shape)}"
        )
    if second_temperature is None:
        return torch.logaddexp(positive_logits_B, log_partition_B) - positive_logits_B
    some = log_partition_B > -torch.inf
    finite = torch.where(some, log_partition_B, 0.0)
    return second_temperature * finite - positive_logits_B


def contrastive_slopes(
    positive_logits_B: Tensor, log_partition_B: Tensor, *, second_temperature: float | None = None
) -> tuple[Tensor, Tensor]:
    """Derivatives of ``contrastive_loss`` by its two arguments, float32 [B] each."""
    if second_temperature is None:
        share = torch.sigmoid(log_partition_B - positive_logits_B)
        return -share, share
    some = log_partition_B > -torch.inf
    return torch.full_like(positive_logits_B, -1.0), second_temperature * some.float()


def automatic_temperature(num_items: int) -> float:
    """What cosines are divided by where nobody said: 0.88 · num_items^-0.215, in [0.05, 0.5].

    The more items a softmax tells apart, the further its logits must reach, and cosines end at 1.
    The power law is no theory: it goes through what validation liked best on logs of 1,000 to
    41,000 items (``pipelines/RESULTS.md``, "One default"); 0.2 for 1,000, 0.12 for 10,000, 0.09 for
    41,000. A learned temperature follows the loss on train instead, which id tables that know their
    rows by heart drive to its lower bound.

    Args:
        num_items: of the catalogue, at least 1.
    """
    return min(max(0.88 * math.pow(num_items, -0.215), 0.05), 0.5)


def information_bound(loss: float, num_alternatives: float) -> float:
    """log(alternatives) - loss, in nats: what a query tells of its positive, at least.

    With negatives drawn in proportion to popularity and no correction (``log_q_strength`` 0) this
    bounds the mutual information of query and positive from below (van den Oord et al. 2018, 2.3)
    and can never say more than log(alternatives). With the full correction, or the full softmax,
    the alternatives are those items that the sources reach, and it says how much better than a
    guess among these, all alike, the model knows the positive: popularity is then part of it.

    Args:
        loss: mean of plain InfoNCE over positives, in nats; no bound follows from any other.
        num_alternatives: what the denominator sums up to where all logits are 0: the positive, and
            each candidate by its weight. At least 1, which tells nothing.

    Returns:
        At most log(num_alternatives); below 0 where the model is worse than the guess.
    """
    return math.log(num_alternatives) - loss


def mean_weights(
    num_rows: int,
    weight_B: Tensor | None,
    *,
    device: torch.device,
    total: Tensor | float | None = None,
) -> Tensor:
    """What each positive's loss counts in their mean, float32 [B].

    Args:
        num_rows: B. weight_B: positive, [B]; None for equal weights.
        total: what to divide by where these are a part of the positives (or none): number or weight
            of all. By default their own, so that the result sums to 1.
    """
    if weight_B is None:
        return torch.full((num_rows,), 1.0, device=device) / (num_rows if total is None else total)
    return weight_B / (weight_B.sum() if total is None else total)


def products_of_own(queries: Tensor, items: Tensor, rows: Tensor) -> Tensor:
    """Products of each query with items of its own, float32 [B, M].

    Args:
        queries: float32 [B, D]. items: float32 [U, D]. rows: int64 [B, M], each below U.
    """
    vectors = items.index_select(0, rows.reshape(-1)).view(*rows.shape, items.shape[1])
    return (queries.unsqueeze(1) * vectors).sum(2)
