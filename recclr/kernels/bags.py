"""Weighted sums of bags of vectors, with a gradient that costs what the bags hold.

Shape letters: U vectors, D dimension, M bags, n rows in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from recclr.kernels import native, native_rows


def bags_of_distinct(
    values: Tensor, offsets: Tensor, weights: Tensor, embed: Callable[[Tensor], Tensor]
) -> Tensor:
    """As ``weighted_bags``, of values that are embedded once each, however often they come.

    Args:
        values: int64 [n]. offsets, weights: as there, weights float32 [n].
        embed: gives float [U, D], the vectors of the U distinct values, rising; also of none.
    """
    distinct, rows, equal = native_rows.sorted_out(values)
    # Also of no value: the tables of another rank may wait for this look-up.
    vectors = embed(distinct)
    if not len(distinct):
        return vectors.new_zeros((len(offsets), vectors.shape[1]))
    return weighted_bags(vectors, rows, offsets, weights, equal)


def weighted_bags(
    vectors: Tensor,
    rows: Tensor,
    offsets: Tensor,
    weights: Tensor | None = None,
    equal: native_rows.EqualValues | None = None,
) -> Tensor:
    """Sum of weight times vector over each bag, float32 [M, D]; zero where a bag is empty.

    Args:
        vectors: float [U, D], at least one. rows: int64 [n], each in [0, U).
        offsets: int64 [M], start of each bag, the first 0.
        weights: float32 [n], no gradient; None for ones.
        equal: where equal rows stand, if that is known and all U of them come; saves sorting them.

    Raises:
        IndexError: a row is none of the U vectors (RuntimeError where PyTorch finds it).
    """
    kernels = native.usable(vectors, rows, offsets, weights)
    plain = vectors.dtype != torch.float32 or not rows.dtype == offsets.dtype == torch.int64
    if weights is not None:
        plain = plain or weights.dtype != torch.float32 or weights.requires_grad
        plain = plain or weights.shape != rows.shape
    # What is wrong is left to PyTorch, which says so.
    if kernels is None or plain or not len(offsets) or int(offsets[0]):
        return embedding_bag(rows, vectors, offsets, mode="sum", per_sample_weights=weights)
    result: Tensor = _Bags.apply(vectors, rows, offsets, weights, equal, kernels)  # type: ignore[no-untyped-call]
    return result


def owners_of(offsets: Tensor, num_rows: int) -> Tensor:
    """The bag of each row, int64 [n]. offsets: int64 [M], as ``weighted_bags`` has them."""
    lengths = torch.diff(offsets, append=offsets.new_tensor([num_rows]))
    numbers = torch.arange(len(offsets), device=offsets.device)
    return numbers.repeat_interleave(lengths, output_size=num_rows)


class _Bags(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        vectors: Tensor,
        rows: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        equal: native_rows.EqualValues | None,
        kernels: CDLL,
    ) -> Tensor:
        ctx.kernels, ctx.size, ctx.equal = kernels, len(vectors), equal
        ctx.save_for_backward(rows, offsets, weights)
        return native_rows.bags(kernels, vectors, rows, offsets, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, offsets, weights = ctx.saved_tensors
        owners = owners_of(offsets, len(rows))
        found = native_rows.bags_backward(
            ctx.kernels, grad_outputs[0], rows, owners, weights, ctx.size, ctx.equal
        )
        assert found is not None, "rows are places among vectors in memory"
        return found, None, None, None, None, None
