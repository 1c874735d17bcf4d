"""Sums over pairs of a function of (negative score, number of the row), in tiles of rows.

Shape letters: B queries, C candidates, M negatives that a row has for itself, K = C + M, D
dimension, R rows of a tile.

What a row pays is the mean of a function over its negatives. Each negative counts by its weight,
exp(log_weight), over the sum of all the weights that take part in the row: with weights of draws
over expected counts that is the ratio estimate of the mean over all items which are no known
positives (Hájek 1971), whatever the mixture of sources, and a constant in all log-weights changes
nothing. A function may also select, for each row, which negatives take part and by how much more.

Gradients are computed while the scores of a tile are in cache, since the scale of a row is known
by then; the backward pass only multiplies. Costs 6·B·K·D multiply-adds and some ten passes over a
tile; memory grows with B + C.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recclr.errors import ShapeError
from recclr.kernels.logsumexp import require_shapes
from recclr.kernels.reference import BitMask, Mask

# Scores of a tile; a function makes a few more of that size. See ``tiled`` for the one on a CPU.
_TILE_BYTES = {"cpu": 1 << 21, "cuda": 1 << 26}
_MIN_ROWS = 16
# A sum of no weights, to divide by.
_NOTHING = 1e-30


class PairFunction(Protocol):
    """What a negative costs its row. Nothing may wait for the device."""

    def value(self, scores: Tensor, anchors: Tensor) -> Tensor:
        """Cost of each pair, [R, K], by operations that autograd knows.

        Args:
            scores: float32 [R, K]. anchors: float32 [R, 1], such as the positive's score.
        """

    def slopes(self, scores: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Derivatives of ``value`` by both, [R, K] each; None where no anchor is used."""

    def selected(self, weights: Tensor, scores: Tensor, anchors: Tensor) -> Tensor:
        """Weights in the mean, from 0 up, [R, K]; has no gradient. May change ``weights``.

        Args:
            weights: of draws over expected counts, 0 for what takes no part, which stays 0.
        """


def total_pair_loss(
    queries: Tensor,
    candidates: Tensor,
    log_weights: Tensor,
    anchors: Tensor,
    row_weights: Tensor,
    function: PairFunction,
    mask: Mask | None = None,
    *,
    own_scores: Tensor | None = None,
    own_log_weights: Tensor | None = None,
) -> Tensor:
    """Σ row_weight · mean of the function over the row's negatives, float32 scalar.

    A row without any negative that takes part costs nothing and has no gradient. Of no rows, or no
    candidates, the result is a 0 that autograd still follows: a rank may have none.

    Args:
        queries: float32 [B, D]. candidates: float32 [C, D]. log_weights: float32 [C], no gradient;
            -inf for what takes no part.
        anchors: float32 [B]. row_weights: float32 [B], no gradient; 1 / B for the mean.
        mask: pairs of query and candidate to leave out.
        own_scores: float32 [B, M], of negatives that a row has for itself. own_log_weights:
            likewise, no gradient; in one unit with ``log_weights``.

    Raises:
        ShapeError: shapes do not belong together, or something is not float32.
    """
    own_scores, own_log_weights = _checked(
        queries, candidates, log_weights, anchors, row_weights, own_scores, own_log_weights
    )
    inputs = (queries, candidates, anchors, own_scores)
    tracked = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
    weights, own_weights = _weights(log_weights, own_log_weights)
    result: Tensor = _TotalPairLoss.apply(  # type: ignore[no-untyped-call]
        *inputs, weights, own_weights, row_weights, function, mask, tracked
    )
    return result


def total_pair_loss_reference(
    queries: Tensor,
    candidates: Tensor,
    log_weights: Tensor,
    anchors: Tensor,
    row_weights: Tensor,
    function: PairFunction,
    mask: Mask | None = None,
    *,
    own_scores: Tensor | None = None,
    own_log_weights: Tensor | None = None,
) -> Tensor:
    """As ``total_pair_loss`` in plain PyTorch, B × K in memory."""
    own_scores, own_log_weights = _checked(
        queries, candidates, log_weights, anchors, row_weights, own_scores, own_log_weights
    )
    if not len(candidates) + own_scores.shape[1]:
        return row_weights.new_zeros(())
    scores, column = torch.cat([queries @ candidates.T, own_scores], 1), anchors.unsqueeze(1)
    shared, own = _weights(log_weights, own_log_weights)
    weights = torch.cat([shared.expand(len(queries), -1), own], 1)
    if isinstance(mask, BitMask):
        weights[:, : len(candidates)][mask.dense(len(candidates))] = 0.0
    elif mask is not None:
        weights[mask.rows, mask.columns] = 0.0
    with torch.no_grad():
        weights = function.selected(weights, scores, column)
        shares = weights / weights.sum(1, keepdim=True).clamp_min(_NOTHING)
    costs = torch.where(shares > 0, function.value(scores, column), 0.0)
    return ((shares * costs).sum(1) * row_weights).sum()


class _TotalPairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        candidates: Tensor,
        anchors: Tensor,
        own_scores: Tensor,
        weights: Tensor,
        own_weights: Tensor,
        row_weights: Tensor,
        function: PairFunction,
        mask: Mask | None,
        tracked: bool,
    ) -> Tensor:
        shared, width = len(candidates), len(candidates) + own_scores.shape[1]
        grads = [torch.zeros_like(each) for each in (queries, candidates, anchors, own_scores)]
        grad_queries, grad_candidates, grad_anchors, grad_own = grads
        costs = torch.zeros_like(anchors)
        for rows, hidden in tiles_of(len(queries), shared, width, queries.device, mask):
            scores = queries.new_empty((rows.stop - rows.start, width))
            torch.mm(queries[rows], candidates.T, out=scores[:, :shared])
            scores[:, shared:] = own_scores[rows]
            taking = torch.empty_like(scores)
            taking[:, :shared] = weights
            taking[:, shared:] = own_weights[rows]
            _hide(taking, hidden, 0.0)
            column = anchors[rows].unsqueeze(1)
            taking = function.selected(taking, scores, column)
            totals = taking.sum(1, keepdim=True).clamp_min_(_NOTHING)
            costs[rows] = (function.value(scores, column) * taking).sum(1) / totals.squeeze(1)
            if not tracked:
                continue
            by_score, by_anchor = function.slopes(scores, column)
            taking.mul_(row_weights[rows].unsqueeze(1) / totals)
            if by_anchor is not None:
                grad_anchors[rows] = (by_anchor * taking).sum(1)
            pulls = by_score.mul_(taking)
            torch.mm(pulls[:, :shared], candidates, out=grad_queries[rows])
            grad_candidates.addmm_(pulls[:, :shared].T, queries[rows])
            grad_own[rows] = pulls[:, shared:]
        if tracked:
            ctx.save_for_backward(*grads)
        return (costs * row_weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        return *(each * grad for each in ctx.saved_tensors), *(None,) * 6


def tiles_of(
    num_rows: int, shared: int, width: int, device: torch.device, mask: Mask | None
) -> Iterator[tuple[slice, Tensor | None]]:
    """Rows of each tile, and what is hidden in it: flat places [P], or bool [R, C]; no tile where
    there are no pairs.

    Places count in a tile of ``width`` columns.
    """
    if not width:
        return
    height = max(_MIN_ROWS, _TILE_BYTES[device.type] // (4 * width))
    edges = [*range(0, num_rows, height), num_rows]
    if mask is None or isinstance(mask, BitMask):
        for start, stop in pairwise(edges):
            rows = slice(start, stop)
            yield rows, None if mask is None else BitMask(mask.words[rows]).dense(shared)
        return
    bounds = torch.searchsorted(mask.rows, torch.tensor(edges, device=device)).tolist()
    for number, (start, stop) in enumerate(pairwise(edges)):
        own = slice(bounds[number], bounds[number + 1])
        # One flat index: filling by (row, column) costs ten times as much.
        yield slice(start, stop), (mask.rows[own] - start) * width + mask.columns[own]


def _hide(tile: Tensor, hidden: Tensor | None, value: float) -> None:
    """Put ``value`` at all places of a tile that ``tiles_of`` hides, in place."""
    if hidden is None:
        return
    if hidden.dtype == torch.bool:
        tile[:, : hidden.shape[1]].masked_fill_(hidden, value)
    else:
        tile.view(-1).index_fill_(0, hidden, value)


def _weights(log_weights: Tensor, own_log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both without their logarithm, over the largest of them, [C] and [B, M]; 0 for -inf."""
    together = relative_weights(torch.cat([log_weights, own_log_weights.reshape(-1)]))
    return together[: len(log_weights)], together[len(log_weights) :].view_as(own_log_weights)


def relative_weights(log_weights: Tensor) -> Tensor:
    """Without their logarithm, over the largest of them, float32 [n]; 0 for -inf.

    What weighs less than 1e-30 of the largest weighs nothing.
    """
    if not len(log_weights):
        return log_weights
    largest = log_weights.amax()
    return (log_weights - torch.where(largest > -torch.inf, largest, 0.0)).exp()


def _checked(
    queries: Tensor,
    candidates: Tensor,
    log_weights: Tensor,
    anchors: Tensor,
    row_weights: Tensor,
    own_scores: Tensor | None,
    own_log_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What a row has for itself, with no columns where there is nothing."""
    require_shapes(queries, candidates, log_weights)
    for name, each in (("anchors", anchors), ("row_weights", row_weights)):
        if each.shape != queries.shape[:1] or each.dtype != torch.float32:
            raise ShapeError(
                f"expected {name} float32 {tuple(queries.shape[:1])}, found {each.dtype} "
                f"{tuple(each.shape)}"
            )
    if own_scores is None or own_log_weights is None:
        own_scores = own_log_weights = queries.new_zeros((len(queries), 0))
    fits = own_scores.ndim == 2 and len(own_scores) == len(queries)
    if not fits or own_scores.shape != own_log_weights.shape:
        raise ShapeError(
            f"expected own_scores and own_log_weights [{len(queries)}, M], found "
            f"{tuple(own_scores.shape)} and {tuple(own_log_weights.shape)}"
        )
    return own_scores, own_log_weights
