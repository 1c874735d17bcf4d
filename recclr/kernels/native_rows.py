"""Rows of tables by the compiled kernels (``native``): grouped, summed, moved, scaled.

Shape letters: n look-ups, R distinct rows, M vectors, D dimension.

A gradient of a table is a sequence of parts (rows int64 [n], gradients float32 [M, D], places int64
[n] or None), as ``optim.summed_rows`` has them: which gradient each row has, or its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import CDLL
from dataclasses import dataclass

import torch
from torch import Tensor

from recclr.kernels.native import floats, longs, threads_for, usable

Part = tuple[Tensor, Tensor, Tensor | None]
# One of several owners of a table's rows, and how many there are.
Share = tuple[int, int]
ALL: Share = (0, 1)

# Over its numbers, by which a sort is as much work as so many multiply-adds of each.
_PASSES = 4
KINDS = ("sgd", "rowwise_adagrad", "rowwise_adam", "adam", "sum")


@dataclass(frozen=True)
class EqualValues:
    """Equal values side by side, int64.

    Attributes:
        distinct: [R], rising. order: [n], places of equal values one after another, each value's in
            the order they came; those of a share alone. starts: [R + 1], where each value begins in
            ``order``.
        inverse: [n], which distinct value each one is, or None.
    """

    distinct: Tensor
    starts: Tensor
    order: Tensor
    inverse: Tensor | None


def equal_values(
    kernels: CDLL, values: Tensor, *, inverse: bool = False, share: Share = ALL
) -> EqualValues | None:
    """Where equal values stand; None where one is below 0 or beyond 32 bits, or they are no int64.

    Args:
        inverse: whether to tell which of the distinct values each one is, of all values alone.
        share: the values that are looked at, see ``owned``.
    """
    if values.dtype != torch.int64 or values.ndim != 1:
        return None
    values = values.contiguous()
    n, threads = len(values), threads_for(_PASSES * len(values))
    scratch, order, places = values.new_empty(2 * (n + threads)), torch.empty_like(values), None
    distinct, starts = torch.empty_like(values), values.new_empty(n + 1)
    if inverse:
        places = torch.empty_like(values)
    arrays = longs(values, scratch, order, distinct, starts, places)
    found = kernels.recclr_group(n, *arrays, *share, threads)
    if found < 0:
        return None
    if share != ALL:
        order = order[: int(starts[found])]
    return EqualValues(distinct[:found], starts[: found + 1], order, places)


def owned(rows: Tensor, share: Share) -> Tensor:
    """Which of int64 [n] rows are one owner's, bool [n]: neighbours in turns, sixteen at a time.

    Their counts stand in one line of a cache, which two owners would take from each other.
    """
    rank, size = share
    owner: Tensor = rows.bitwise_right_shift(4).remainder(size)
    return owner == rank


def unique(values: Tensor) -> tuple[Tensor, Tensor]:
    """As ``torch.unique`` with its inverse, of int64 [n]: rising values [R], places [n] among them.

    Several times as fast on a CPU, by counting digits where PyTorch compares.
    """
    return sorted_out(values)[:2]


def sorted_out(values: Tensor) -> tuple[Tensor, Tensor, EqualValues | None]:
    """As ``unique``; and where equal values stand, if the kernels found them."""
    kernels = usable(values)
    found = None if kernels is None else equal_values(kernels, values, inverse=True)
    if found is None or found.inverse is None:
        return *torch.unique(values, return_inverse=True), None
    return found.distinct, found.inverse, found


def summed(kernels: CDLL, parts: Sequence[Part]) -> tuple[Tensor, Tensor] | None:
    """Distinct rows, rising, and the sum of each one's gradients in the order of the parts.

    None where the kernels cannot: gradients are not float32 or not of one width, or a row is too
    large a number.
    """
    width = parts[0][1].shape[1]
    if any(grads.dtype != torch.float32 or grads.shape[1] != width for _, grads, _ in parts):
        return None
    groups = equal_values(kernels, _rows_of(parts))
    if groups is None:
        return None
    sums = parts[0][1].new_empty((len(groups.distinct), width))
    _move(kernels, "sum", groups, parts, sums, {}, 0.0)
    return groups.distinct, sums


def move(
    kernels: CDLL,
    kind: str,
    parts: Sequence[Part],
    weight: Tensor,
    state: Mapping[str, Tensor],
    lr: float,
    share: Share = ALL,
) -> bool:
    """An optimiser's step of every row by the sum of its gradients, in place; False: not done.

    Args:
        kind: of KINDS. weight: float32 [num_rows, D]. state: ``TableOptimizer.state`` of the table.
        share: the rows that are moved, see ``owned``.
    """
    tensors = [weight, *state.values(), *(grads for _, grads, _ in parts)]
    if any(x.dtype != torch.float32 or x.device.type != "cpu" for x in tensors):
        return False
    if not all(x.is_contiguous() for x in (weight, *state.values())):
        return False
    groups = equal_values(kernels, _rows_of(parts), share=share)
    # What does not fit is left to PyTorch, which says so.
    if groups is None or any(grads.shape[1] != weight.shape[1] for _, grads, _ in parts):
        return False
    if len(groups.distinct) and int(groups.distinct[-1]) >= len(weight):
        return False
    _move(kernels, kind, groups, parts, weight, state, lr)
    return True


def _move(
    kernels: CDLL,
    kind: str,
    groups: EqualValues,
    parts: Sequence[Part],
    weight: Tensor,
    state: Mapping[str, Tensor],
    lr: float,
) -> None:
    arrays = [grads.contiguous() for _, grads, _ in parts]
    ends, before = [], 0
    for grads in arrays:
        before += len(grads)
        ends.append(before)
    places = None
    if any(each is not None for _, _, each in parts):
        places = places_of(parts)
    kernels.recclr_move(
        KINDS.index(kind),
        len(groups.distinct),
        *longs(groups.distinct, groups.starts, groups.order, places),
        (ctypes.c_int64 * len(ends))(*ends),
        (ctypes.c_void_p * len(arrays))(*floats(*arrays)),
        weight.shape[1],
        *floats(weight, *(state.get(name) for name in ("first", "second", "count"))),
        lr,
        threads_for(len(groups.order) * weight.shape[1]),
    )


def _rows_of(parts: Sequence[Part]) -> Tensor:
    return parts[0][0] if len(parts) == 1 else torch.cat([rows for rows, _, _ in parts])


def places_of(parts: Sequence[Part]) -> Tensor:
    """Where the gradient of each row stands among those of all parts, int64 [n]."""
    first = parts[0][2]
    if len(parts) == 1 and first is not None:
        return first.contiguous()
    found, before = [], 0
    for rows, grads, places in parts:
        if places is None:
            places = torch.arange(len(grads), device=rows.device)
        found.append(places + before)
        before += len(grads)
    return torch.cat(found)


def bags(
    kernels: CDLL, vectors: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor | None
) -> Tensor:
    """As ``bags.weighted_bags``, without a gradient.

    Raises:
        IndexError: as there.
    """
    vectors = vectors.contiguous()
    starts = torch.cat([offsets, offsets.new_tensor([len(rows)])])
    result = vectors.new_empty((len(offsets), vectors.shape[1]))
    weights = None if weights is None else weights.contiguous()
    _bags(kernels, starts, None, rows.contiguous(), weights, vectors, result)
    return result


def bags_backward(
    kernels: CDLL,
    grad: Tensor,
    rows: Tensor,
    owners: Tensor,
    weights: Tensor | None,
    size: int,
    equal: EqualValues | None,
) -> Tensor | None:
    """Gradient of the ``size`` vectors that ``bags`` was given.

    Args:
        owners: int64 [n], bag of each row. equal: where equal rows stand, if that is known.
    """
    if equal is None:
        equal = equal_values(kernels, rows)
    if equal is None:
        return None
    grad, weights = grad.contiguous(), None if weights is None else weights.contiguous()
    found = grad.new_empty((len(equal.distinct), grad.shape[1]))
    _bags(kernels, equal.starts, equal.order, owners, weights, grad, found)
    if len(found) == size:
        return found
    return grad.new_zeros((size, grad.shape[1])).index_copy_(0, equal.distinct, found)


def _bags(
    kernels: CDLL,
    starts: Tensor,
    order: Tensor | None,
    rows: Tensor,
    weights: Tensor | None,
    vectors: Tensor,
    result: Tensor,
) -> None:
    arrays = *longs(starts, order, rows), *floats(weights, vectors)
    threads = threads_for(len(rows) * result.shape[1])
    out = len(vectors), *floats(result), threads
    if kernels.recclr_bags(*result.shape, len(rows), *arrays, *out):
        raise IndexError(
            f"a bag reaches beyond its {len(rows)} rows, or asks for a vector that is none of "
            f"{len(vectors)}"
        )


def unit(kernels: CDLL, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of float32 [M, D] over their lengths, and these, [M, 1], at least 1e-12."""
    x = x.contiguous()
    result, lengths = torch.empty_like(x), x.new_empty((len(x), 1))
    kernels.recclr_unit(*x.shape, *floats(x, result, lengths), threads_for(x.numel()))
    return result, lengths


def unit_backward(kernels: CDLL, grad: Tensor, unit: Tensor, lengths: Tensor) -> Tensor:
    """Gradient of the rows that ``unit`` was given."""
    unit, lengths, grad = unit.contiguous(), lengths.contiguous(), grad.contiguous()
    result = torch.empty_like(grad)
    arrays = floats(unit, lengths, grad, result)
    kernels.recclr_unit_backward(*grad.shape, *arrays, threads_for(grad.numel()))
    return result
