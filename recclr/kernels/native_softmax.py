"""``masked_logsumexp`` and the loss with its gradients by the compiled kernels (``native``).

Shape letters: B queries, C candidates, D dimension.

Cost: 6·B·C·D operations and B·C exponentials for a loss with its gradients where those of 24 rows
may be kept (C up to 169,000, and (threads + 2)·C·D up to 2^26), 8·B·C·D and 2·B·C beyond that and
for a log-sum-exp alone. Memory beside arguments and gradients: (threads + 2)·C·D floats, up to
256 MiB, and 16 MiB a thread; beyond that candidates come a slice at a time.
"""

from __future__ import annotations

import math
from ctypes import CDLL
from typing import Any

import torch
from torch import Tensor

from recclr.errors import ShapeError
from recclr.kernels.native import floats, longs, threads_for
from recclr.kernels.reference import PairMask
from recclr.kernels.tiled import borrow, give_back

# Exponentials that a thread keeps until its rows are summed: 16 MiB. Those of 96 rows fit for C up
# to 42,000; with fewer rows the candidates are read more often, and a sixteenth of it costs a third
# more at C = 41,000, D = 64. Below C = 2,700 it makes no difference.
_FLOATS = 1 << 22

# Losses [B]; gradients of their weighted sum by queries, candidates, positive logits and
# ``own_partition``, the last None where that is.
OnePass = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class _Problem:
    """Arguments as the kernels take them, kept alive and contiguous while they run."""

    def __init__(
        self, queries: Tensor, candidates: Tensor, log_weights: Tensor, mask: PairMask | None
    ) -> None:
        self.sizes = len(queries), len(candidates), queries.shape[1]
        self.threads = threads_for(math.prod(self.sizes))
        self.arrays = [x.detach().contiguous() for x in (queries, candidates, log_weights)]
        pairs = () if mask is None else (mask.rows, mask.columns)
        self.pairs = [x.contiguous() for x in pairs]

    def room(self, kernels: CDLL, *, backward: bool) -> Tensor:
        size = kernels.recclr_room(*self.sizes, self.threads, _FLOATS, backward)
        return borrow(size, torch.device("cpu"))

    def arguments(self, buffer: Tensor, kept: int) -> tuple[int | None, ...]:
        """``kept``: what the room of the buffer was asked with."""
        pairs = longs(*self.pairs) or [None, None]
        masked = len(self.pairs[0]) if self.pairs else 0
        arrays = floats(*self.arrays)
        return *self.sizes, *arrays, *pairs, masked, self.threads, kept, *floats(buffer)


def contrastive(
    queries: Tensor,
    candidates: Tensor,
    log_weights: Tensor,
    positive_logits: Tensor,
    row_weights: Tensor,
    own_partition: Tensor | None,
    *,
    kernels: CDLL,
    mask: PairMask | None,
    second_temperature: float | None,
) -> OnePass:
    """Losses and gradients; arguments as ``total_contrastive_loss`` has them, B and C at least 1.

    Raises:
        ShapeError: a value per row is missing, or not float32.
    """
    by_row = [positive_logits, row_weights] + ([] if own_partition is None else [own_partition])
    for x in by_row:
        if x.shape != queries.shape[:1] or x.dtype != torch.float32:
            raise ShapeError(
                f"expected float32 {tuple(queries.shape[:1])} for each value of a row, found "
                f"{x.dtype} {tuple(x.shape)}"
            )
    by_row = [x.detach().contiguous() for x in by_row]
    problem = _Problem(queries, candidates, log_weights, mask)
    losses, grad_positives = torch.empty_like(by_row[0]), torch.empty_like(by_row[0])
    grad_queries, grad_candidates = (torch.empty_like(x) for x in problem.arrays[:2])
    grad_own = None if own_partition is None else torch.empty_like(losses)
    buffer = problem.room(kernels, backward=True)
    kernels.recclr_contrastive(
        *problem.arguments(buffer, _FLOATS),
        *floats(*by_row[:2], by_row[2] if own_partition is not None else None),
        math.nan if second_temperature is None else second_temperature,
        *floats(losses, grad_queries, grad_candidates, grad_positives, grad_own),
    )
    give_back(buffer)
    return losses, grad_queries, grad_candidates, grad_positives, grad_own


def distilled(
    queries: Tensor,
    candidates: Tensor,
    teacher_queries: Tensor,
    teacher_candidates: Tensor,
    log_weights: Tensor,
    row_weights: Tensor,
    *,
    kernels: CDLL,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Costs of rows [B], and the gradients of their weighted sum by queries and candidates;
    arguments as ``total_distillation_loss`` has checked them.

    None where the scores of 24 rows, of both, are more than a thread may keep.
    """
    problem = _Problem(queries, candidates, log_weights, None)
    told_dim = teacher_queries.shape[1]
    size = kernels.recclr_distilled_room(*problem.sizes, told_dim, problem.threads, _FLOATS // 2)
    if not size:
        return None
    told = [x.contiguous() for x in (teacher_queries, teacher_candidates, row_weights)]
    costs = torch.empty_like(told[2])
    grad_queries, grad_candidates = (torch.empty_like(x) for x in problem.arrays[:2])
    buffer = borrow(size, torch.device("cpu"))
    kernels.recclr_distilled(
        *problem.arguments(buffer, _FLOATS // 2),
        told_dim,
        *floats(*told, costs, grad_queries, grad_candidates),
    )
    give_back(buffer)
    return costs, grad_queries, grad_candidates


def masked_logsumexp_native(
    queries: Tensor,
    candidates: Tensor,
    log_weights: Tensor,
    mask: PairMask | None,
    kernels: CDLL,
) -> Tensor:
    """As ``masked_logsumexp``, for arguments that it has checked and at least one candidate."""
    result: Tensor = _LogSumExp.apply(queries, candidates, log_weights, mask, kernels)  # type: ignore[no-untyped-call]
    return result


class _LogSumExp(torch.autograd.Function):
    """Keeps the results only; the backward pass makes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        candidates: Tensor,
        log_weights: Tensor,
        mask: PairMask | None,
        kernels: CDLL,
    ) -> Tensor:
        problem = _Problem(queries, candidates, log_weights, mask)
        result = problem.arrays[0].new_empty(len(queries))
        buffer = problem.room(kernels, backward=False)
        kernels.recclr_logsumexp(*problem.arguments(buffer, _FLOATS), *floats(result))
        give_back(buffer)
        ctx.save_for_backward(queries, candidates, log_weights, result)
        ctx.mask, ctx.kernels = mask, kernels
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Not once_differentiable, which would give a gradient without one of its own.
            raise RuntimeError(
                "the compiled kernels have no automatic differentiation of gradients"
            )
        queries, candidates, log_weights, result = ctx.saved_tensors
        problem = _Problem(queries, candidates, log_weights, ctx.mask)
        slope = grad_outputs[0].contiguous()
        gradients = [torch.empty_like(x) for x in problem.arrays[:2]]
        by_weights = None
        if ctx.needs_input_grad[2]:
            by_weights = result.new_zeros(problem.threads, problem.sizes[1])
        buffer = problem.room(ctx.kernels, backward=True)
        ctx.kernels.recclr_logsumexp_backward(
            *problem.arguments(buffer, _FLOATS),
            *floats(result, slope, *gradients, by_weights),
        )
        give_back(buffer)
        return *gradients, None if by_weights is None else by_weights.sum(0), None, None
