"""Objectives over scores that are already divided by the temperature.

Shape letters: B queries (positives), C candidates.

With s the positive logit and Z = log Σ_j exp(logit_j - log_q_j) over candidates that are no known
positives of the row (``kernels.masked_logsumexp``):

* InfoNCE / sampled softmax: log(exp(s) + exp(Z)) - s. The positive is in the denominator with
  probability 1 and gets no correction (Khrylchenko et al., RecSys 2025, who drop it from the
  denominator instead); Z estimates the rest of the full softmax over the items that are not known
  positives, without bias in exp(Z).
* BSL (Wu et al. 2024): t₂·Z - s. The denominator holds negatives only and is raised to the power
  t₂, the ratio of the two temperatures.
"""

from __future__ import annotations

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


def weighted_mean(
    loss_B: Tensor, weight_B: Tensor | None, *, total: Tensor | float | None = None
) -> Tensor:
    """Mean over positives, float32 scalar; by ``weight_B`` (positive, [B]) where it is given.

    Args:
        total: what to divide by where these are a part of the positives (or none): number or weight
            of all; the parts then sum up to the mean.
    """
    if total is not None:
        return (loss_B if weight_B is None else loss_B * weight_B).sum() / total
    if weight_B is None:
        return loss_B.mean()
    return (loss_B * weight_B).sum() / weight_B.sum()
