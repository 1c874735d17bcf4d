"""How far a softmax over candidates is from that of a teacher, in tiles of rows.

Shape letters: B queries, C candidates, D dimension, T dimension of the teacher, R rows of a tile.

With s the scores of a row and t those of the teacher, both divided by their temperatures, and ω the
weight of a candidate: p ∝ ω·exp(t), q ∝ ω·exp(s), and a row pays KL(p ‖ q) = Σ p·(log p - log q),
whose derivative by s is q - p (Hinton, Vinyals and Dean 2015, with soft targets alone). With
weights of draws over expected counts both sums estimate those over the catalogue.

Gradients are computed while a tile is in cache, as in ``pairwise``. Costs 6·B·C·D + 2·B·C·T
multiply-adds and two exponentials for each pair; memory grows with B + C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recclr.errors import ShapeError
from recclr.kernels import native, native_softmax
from recclr.kernels.logsumexp import require_shapes
from recclr.kernels.pairwise import fill_hidden, relative_weights, tiles_of
from recclr.kernels.reference import BitMask, Mask

# In place of a score that takes no part: finite, since the gap of two of them is multiplied by 0.
_HIDDEN = -1e30
_NOTHING = 1e-30


def total_distillation_loss(
    queries: Tensor,
    candidates: Tensor,
    teacher_queries: Tensor,
    teacher_candidates: Tensor,
    log_weights: Tensor,
    row_weights: Tensor,
    mask: Mask | None = None,
) -> Tensor:
    """Σ row_weight · KL(teacher ‖ student), in nats, at least 0, float32 scalar.

    A row all of whose candidates are left out costs nothing and has no gradient.

    Args:
        queries: float32 [B, D]. candidates: float32 [C, D]. teacher_queries: float32 [B, T].
            teacher_candidates: float32 [C, T]; both are without gradient.
        log_weights: float32 [C], no gradient; -inf for what takes no part.
        row_weights: float32 [B], no gradient; 1 / B for the mean.
        mask: pairs of query and candidate to leave out.

    Raises:
        ShapeError: shapes do not belong together, or something is not float32.
    """
    _check(queries, candidates, teacher_queries, teacher_candidates, log_weights, row_weights)
    tracked = torch.is_grad_enabled() and (queries.requires_grad or candidates.requires_grad)
    weights = relative_weights(log_weights)
    result: Tensor = _TotalDistillationLoss.apply(  # type: ignore[no-untyped-call]
        queries,
        candidates,
        teacher_queries.detach(),
        teacher_candidates.detach(),
        weights,
        row_weights,
        mask,
        tracked,
    )
    return result


def total_distillation_loss_reference(
    queries: Tensor,
    candidates: Tensor,
    teacher_queries: Tensor,
    teacher_candidates: Tensor,
    log_weights: Tensor,
    row_weights: Tensor,
    mask: Mask | None = None,
) -> Tensor:
    """As ``total_distillation_loss`` in plain PyTorch, B × C in memory."""
    hidden = (log_weights == -torch.inf).expand(len(queries), -1).clone()
    if isinstance(mask, BitMask):
        hidden |= mask.dense(len(candidates))
    elif mask is not None:
        hidden[mask.rows, mask.columns] = True
    some = ~hidden.all(1, keepdim=True)
    shift = log_weights.masked_fill(log_weights == -torch.inf, 0.0)
    logs = []
    for one, other in ((teacher_queries, teacher_candidates), (queries, candidates)):
        logits = (one @ other.T + shift).masked_fill(hidden & some, -torch.inf)
        logs.append(logits.log_softmax(1).masked_fill(hidden, 0.0))
    told = logs[0].detach()
    costs = (told.exp().masked_fill(hidden, 0.0) * (told - logs[1])).sum(1)
    return (costs * row_weights).sum()


class _TotalDistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        candidates: Tensor,
        teacher_queries: Tensor,
        teacher_candidates: Tensor,
        weights: Tensor,
        row_weights: Tensor,
        mask: Mask | None,
        tracked: bool,
    ) -> Tensor:
        width = len(candidates)
        kernels = native.usable(queries)
        if kernels is not None and min(len(queries), width) and not isinstance(mask, BitMask):
            inputs = queries, candidates, teacher_queries, teacher_candidates, weights.log()
            found = native_softmax.distilled(*inputs, row_weights, kernels=kernels, mask=mask)
            if found is not None:
                costs, *grads = found
                if tracked:
                    ctx.save_for_backward(*grads)
                return (costs * row_weights).sum()
        grad_queries, grad_candidates = torch.zeros_like(queries), torch.zeros_like(candidates)
        costs = torch.zeros_like(row_weights)
        for rows, hidden in tiles_of(len(queries), width, width, queries.device, mask):
            told = teacher_queries[rows] @ teacher_candidates.T
            scores = queries[rows] @ candidates.T
            fill_hidden(told, hidden, _HIDDEN)
            fill_hidden(scores, hidden, _HIDDEN)
            gaps = told - scores
            teachers = _partition(told, weights, hidden)
            own = _partition(scores, weights, hidden)
            # Where nothing takes part both sums are 0, and what they are divided by is no matter.
            costs[rows] = (gaps.mul_(told)).sum(1) + (own - teachers).squeeze(1)
            if not tracked:
                continue
            pulls = scores.sub_(told).mul_(row_weights[rows].unsqueeze(1))
            torch.mm(pulls, candidates, out=grad_queries[rows])
            grad_candidates.addmm_(pulls.T, queries[rows])
        if tracked:
            ctx.save_for_backward(grad_queries, grad_candidates)
        return (costs * row_weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        return *(each * grad for each in ctx.saved_tensors), *(None,) * 6


def _partition(scores: Tensor, weights: Tensor, hidden: Tensor | None) -> Tensor:
    """Make scores [R, C] the shares of the weighted softmax, in place; log of its sum, [R, 1].

    Both are 0 in a row where nothing takes part.
    """
    # What has no weight must not set the scale: beside it all others might vanish.
    largest = scores.masked_fill(weights == 0, _HIDDEN).amax(1, keepdim=True)
    scores.sub_(largest).clamp_(max=0.0).exp_().mul_(weights)
    fill_hidden(scores, hidden, 0.0)
    sums = scores.sum(1, keepdim=True)
    some = sums > 0
    scores.div_(sums.clamp_min(_NOTHING))
    return torch.where(some, sums.clamp_min(_NOTHING).log() + largest, 0.0)


def _check(
    queries: Tensor,
    candidates: Tensor,
    teacher_queries: Tensor,
    teacher_candidates: Tensor,
    log_weights: Tensor,
    row_weights: Tensor,
) -> None:
    require_shapes(queries, candidates, log_weights)
    if row_weights.shape != queries.shape[:1] or row_weights.dtype != torch.float32:
        raise ShapeError(
            f"expected row_weights float32 [{len(queries)}], found {row_weights.dtype} "
            f"{tuple(row_weights.shape)}"
        )
    told = teacher_queries, teacher_candidates
    lengths = (len(queries), len(candidates))
    fits = all(x.ndim == 2 and x.dtype == torch.float32 for x in told)
    fits = fits and tuple(map(len, told)) == lengths
    if not fits or teacher_queries.shape[1] != teacher_candidates.shape[1]:
        raise ShapeError(
            f"expected float32 [{lengths[0]}, T] and [{lengths[1]}, T] of the teacher, found "
            f"{tuple(teacher_queries.shape)} and {tuple(teacher_candidates.shape)}"
        )
