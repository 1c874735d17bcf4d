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
from recclr.kernels.pairwise import relative_weights, tiles_of

# A sum of no weights, to divide by.
_NOTHING = 1e-30


def total_distillation_loss(
    queries: Tensor,
    candidates: Tensor,
    teacher_queries: Tensor,
    teacher_candidates: Tensor,
    log_weights: Tensor,
    row_weights: Tensor,
) -> Tensor:
    """Σ row_weight · KL(teacher ‖ student), in nats, at least 0, float32 scalar.

    Where no candidate takes part it is 0, with no gradient.

    Args:
        queries: float32 [B, D]. candidates: float32 [C, D]. teacher_queries: float32 [B, T].
            teacher_candidates: float32 [C, T]; both are without gradient.
        log_weights: float32 [C], no gradient; -inf for what takes no part.
        row_weights: float32 [B], no gradient; 1 / B for the mean.

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
) -> Tensor:
    """As ``total_distillation_loss`` in plain PyTorch, B × C in memory."""
    kept = log_weights > -torch.inf
    if not kept.any():
        return row_weights.new_zeros(())
    logs = [
        (one @ other[kept].T + log_weights[kept]).log_softmax(1)
        for one, other in ((teacher_queries.detach(), teacher_candidates), (queries, candidates))
    ]
    return ((logs[0].exp() * (logs[0] - logs[1])).sum(1) * row_weights).sum()


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
        tracked: bool,
    ) -> Tensor:
        width = len(candidates)
        kernels = native.usable(queries)
        if kernels is not None and min(len(queries), width):
            inputs = queries, candidates, teacher_queries, teacher_candidates, weights.log()
            found = native_softmax.distilled(*inputs, row_weights, kernels=kernels)
            if found is not None:
                costs, *grads = found
                if tracked:
                    ctx.save_for_backward(*grads)
                return (costs * row_weights).sum()
        grad_queries, grad_candidates = torch.zeros_like(queries), torch.zeros_like(candidates)
        costs = torch.zeros_like(row_weights)
        for rows, _ in tiles_of(len(queries), width, width, queries.device, None):
            told = teacher_queries[rows] @ teacher_candidates.T
            scores = queries[rows] @ candidates.T
            gaps = told - scores
            teachers, own = _partition(told, weights), _partition(scores, weights)
            costs[rows] = gaps.mul_(told).sum(1) + (own - teachers).squeeze(1)
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
        return *(each * grad for each in ctx.saved_tensors), *(None,) * 5


def _partition(scores: Tensor, weights: Tensor) -> Tensor:
    """Make scores [R, C] the shares of the weighted softmax, in place; log of its sum, [R, 1].

    Both are 0 where nothing takes part.
    """
    # What has no weight must not set the scale: beside it all others might vanish.
    largest = scores.masked_fill(weights == 0, -torch.inf).amax(1, keepdim=True)
    largest = torch.where(largest > -torch.inf, largest, 0.0)
    scores.sub_(largest).clamp_(max=0.0).exp_().mul_(weights)
    sums = scores.sum(1, keepdim=True)
    scores.div_(sums.clamp_min(_NOTHING))
    return torch.where(sums > 0, sums.clamp_min(_NOTHING).log() + largest, 0.0)


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
