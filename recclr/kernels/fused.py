"""Contrastive loss whose gradient is computed while the probabilities are in cache.

Shape letters: B queries, C candidates, D dimension.

The slope of the loss by a row's log-partition follows from that number and the positive's logit, so
the two gradient GEMMs of a few rows can follow their logits at once: 6·B·C·D multiply-adds and B·C
exponentials, as with stored probabilities, without writing them to memory (the idea of fused linear
cross-entropy, Liger kernels 2024). The backward pass only scales. On a CPU by the compiled kernels
(``native_softmax``), and tile by tile in PyTorch where these are missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recclr.kernels import native, native_softmax
from recclr.kernels.grouped import GroupMask, Part, group_parts
from recclr.kernels.logsumexp import masked_logsumexp, require_shapes
from recclr.kernels.native_softmax import OnePass
from recclr.kernels.reference import BitMask, Mask
from recclr.kernels.tiled import (
    Tiles,
    borrow,
    give_back,
    joined,
    logit_bound,
    padded,
    share_of_row,
)
from recclr.losses import contrastive_loss, contrastive_slopes

# Rows of fewer than so many queries would be all that fits a tile: recomputing is cheaper then.
_MIN_HEIGHT = 128


def total_contrastive_loss(
    queries: Tensor,
    candidates: Tensor,
    log_weights: Tensor,
    positive_logits: Tensor,
    row_weights: Tensor,
    mask: Mask | None = None,
    *,
    own_partition: Tensor | None = None,
    second_temperature: float | None = None,
    bfloat16: bool = False,
) -> Tensor:
    """Σ row_weight · ``contrastive_loss``(positive logit, ``masked_logsumexp``), float32 scalar.

    Args:
        queries: float32 [B, D], divided by the temperature. candidates: float32 [C, D].
        log_weights: float32 [C]; has no gradient here. mask: pairs to leave out.
        positive_logits: float32 [B]. row_weights: float32 [B], no gradient; 1 / B for the mean.
        own_partition: float32 [B], log of the weighted sum over negatives that a row has for
            itself, which is added to that over the shared ones; -inf where it has none.
        bfloat16: on a CPU multiply in bfloat16 for the two gradients, each of which is then off
            by 0.1 to 0.2 % of its length; loss and logits stay as they are. Only where the compiled
            kernels are missing, which are faster in float32; it then saves a fifth to a third of
            the time where the CPU has such instructions (AVX-512 BF16, AMX), and costs far more
            where not. On a GPU see ``masked_logsumexp``.

    Raises:
        ShapeError: as ``masked_logsumexp`` and ``contrastive_loss``.
    """
    if isinstance(mask, GroupMask) and queries.device.type == "cpu" and len(queries):
        by_row = [queries, positive_logits, row_weights]
        by_row += [] if own_partition is None else [own_partition]
        parts, _ = group_parts(by_row, candidates, log_weights, mask)
        return torch.stack([_of_part(part, second_temperature, bfloat16) for part in parts]).sum()
    tracked = torch.is_grad_enabled() and any(
        each is not None and each.requires_grad
        for each in (queries, candidates, positive_logits, own_partition)
    )
    fits = queries.device.type == "cpu" and len(queries) and len(candidates)
    if tracked and fits and not isinstance(mask, BitMask):
        require_shapes(queries, candidates, log_weights)
        one_pass: Callable[..., OnePass] | None = None
        kernels = native.usable(queries, candidates, log_weights, positive_logits, row_weights)
        if kernels is not None:
            one_pass = partial(native_softmax.contrastive, kernels=kernels, mask=mask)
        else:
            candidates, log_weights = padded(candidates, log_weights)
            tiles = Tiles(len(queries), len(candidates), queries.device, mask, whole_rows=True)
            if tiles.height >= min(_MIN_HEIGHT, len(queries)):
                one_pass = partial(_tile_by_tile, tiles=tiles, bfloat16=bfloat16)
        if one_pass is not None:
            one_pass = partial(one_pass, second_temperature=second_temperature)
            result: Tensor = _TotalLoss.apply(  # type: ignore[no-untyped-call]
                queries,
                candidates,
                log_weights,
                positive_logits,
                row_weights,
                own_partition,
                one_pass,
            )
            return result
    log_partition = masked_logsumexp(queries, candidates, log_weights, mask, bfloat16=bfloat16)
    if own_partition is not None:
        log_partition = either(log_partition, own_partition)
    loss = contrastive_loss(positive_logits, log_partition, second_temperature=second_temperature)
    return (loss * row_weights).sum()


def _of_part(part: Part, second_temperature: float | None, bfloat16: bool) -> Tensor:
    """The loss of the rows of one group."""
    queries, logits, weights, *own = part.by_row
    return total_contrastive_loss(
        queries,
        part.candidates,
        part.log_weights,
        logits,
        weights,
        part.pairs,
        own_partition=own[0] if own else None,
        second_temperature=second_temperature,
        bfloat16=bfloat16,
    )


class _TotalLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        candidates: Tensor,
        log_weights: Tensor,
        positive_logits: Tensor,
        row_weights: Tensor,
        own_partition: Tensor | None,
        one_pass: Callable[..., OnePass],
    ) -> Tensor:
        losses, *gradients = one_pass(
            queries, candidates, log_weights, positive_logits, row_weights, own_partition
        )
        ctx.has_own = own_partition is not None
        ctx.save_for_backward(*(each for each in gradients if each is not None))
        return (losses * row_weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        found: tuple[Tensor, ...] = ctx.saved_tensors
        # Mostly the loss is all there is, and multiplying by 1 would cost another pass.
        if float(grad) != 1.0:
            found = tuple(each * grad for each in found)
        queries, candidates, positives, *rest = found
        return queries, candidates, None, positives, None, rest[0] if ctx.has_own else None, None


def _tile_by_tile(
    queries: Tensor,
    candidates: Tensor,
    log_weights: Tensor,
    positive_logits: Tensor,
    row_weights: Tensor,
    own_partition: Tensor | None,
    *,
    tiles: Tiles,
    second_temperature: float | None,
    bfloat16: bool,
) -> OnePass:
    grad_queries = torch.zeros_like(queries)
    grad_candidates = torch.zeros_like(candidates)
    grad_positives = torch.empty_like(positive_logits)
    grad_own = None if own_partition is None else torch.empty_like(positive_logits)
    losses = torch.empty_like(positive_logits)
    scratch = borrow(tiles.height * tiles.num_columns, queries.device)
    rounded = None
    if bfloat16:
        rounded = queries.new_empty(tiles.height * tiles.width, dtype=torch.bfloat16)
    bound = logit_bound(queries, candidates, log_weights)
    weights = log_weights if bound is None else log_weights - bound
    shifts = queries.new_empty((len(queries), tiles.num_blocks))
    sums = torch.empty_like(shifts)
    for origin, group in groupby(tiles, lambda tile: tile.rows.start * tiles.num_columns):
        blocks = list(group)
        rows = blocks[0].rows
        for tile in blocks:
            out = tile.place(scratch, origin)
            tile.exponentials(queries, candidates, weights, out, shifts, sums, bound)
        result = joined(sums[rows], shifts[rows])
        partition = result.squeeze(1)
        if own_partition is not None:
            partition = either(partition, own_partition[rows])
        pair = positive_logits[rows], partition
        losses[rows] = contrastive_loss(*pair, second_temperature=second_temperature)
        by_positive, by_partition = contrastive_slopes(*pair, second_temperature=second_temperature)
        grad_positives[rows] = by_positive * row_weights[rows]
        scale = (by_partition * row_weights[rows]).unsqueeze(1)
        if own_partition is not None and grad_own is not None:
            own = share_of_row(own_partition[rows].unsqueeze(1), partition.unsqueeze(1))
            grad_own[rows] = (scale * own).squeeze(1)
        # Of the whole denominator: what a row has for itself takes its share of the slope.
        scale = scale * share_of_row(shifts[rows], partition.unsqueeze(1))
        for tile in blocks:
            out = tile.place(scratch, origin)
            share = scale[:, tile.block]
            tile.add_gradients(
                out, share, queries, candidates, grad_queries, grad_candidates, rounded
            )
    give_back(scratch)
    return losses, grad_queries, grad_candidates, grad_positives, grad_own


def either(log_partition: Tensor, own_partition: Tensor) -> Tensor:
    """Log of the sum of both; -inf, without a gradient that is no number, where both are."""
    some = (log_partition > -torch.inf) | (own_partition > -torch.inf)
    joint = torch.logaddexp(log_partition.where(some, 0.0), own_partition.where(some, 0.0))
    return joint.where(some, -torch.inf)
