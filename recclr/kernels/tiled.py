"""Masked, weighted log-sum-exp in tiles of queries and candidates.

Shape letters: B queries, C candidates, D dimension.

Cost (performance.md §3 (i)): 6·B·C·D multiply-adds and B·C exponentials when the probabilities fit
``_STORE_BYTES``, 8·B·C·D and 2·B·C with recomputation beyond that; memory then grows with B + C
only (and B·C / 1,024 for the sums of the blocks). A tile of logits is written, exponentiated and
read while it is in cache: plain PyTorch loses its time in allocating and streaming B × C, not in
arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from recclr.kernels.reference import PairMask

# One tile of logits. On a CPU it exceeds the second-level cache: larger GEMMs gain more than the
# passes in between lose (7.1 ms against 8.2 ms with 1 MiB, B = 2048). On a GPU it bounds memory.
_TILE_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
# Widest block of candidates: beyond it tiles would be too low for the GEMM to reuse a candidate.
_MAX_WIDTH = {"cpu": 1024, "cuda": 1 << 20}
# Where whole rows are needed: GEMMs of fewer rows are slow, four times a tile still shares a cache
# (B = C = 8,192, D = 128: 379 ms with 512 rows, 441 ms with 256, 491 ms with 128).
_ROWS, _MAX_FACTOR = 512, 4
_ALIGN = 16
# Up to here keeping the probabilities for the backward pass is cheaper than a second GEMM and a
# second exponential (measured: .72 s against .96 s at B = C = 8,192, D = 128 on one core).
_STORE_BYTES = 1 << 29
# Logits that all lie within so much of their bound are not shifted by row; 40 below it, float32 has
# a relative precision of 2e-6 left.
_RANGE = 40.0
# exp of less takes 15 to 35 times as long (underflow leaves the vector path); beside a sum of at
# least 1 it is 0 all the same.
_SMALLEST = -87.0
# Buffers waiting for the next step. Fresh memory of this size comes from the kernel page by page,
# which costs three times the arithmetic (59 ms against 18 ms per step as above).
_pool: list[Tensor] = []
_pool_lock = Lock()


def masked_logsumexp_tiled(
    queries: Tensor, candidates: Tensor, log_weights: Tensor, mask: PairMask | None = None
) -> Tensor:
    """As ``masked_logsumexp``, for arguments that it has checked and at least one candidate."""
    candidates, log_weights = padded(candidates, log_weights)
    result: Tensor = _MaskedLogSumExp.apply(queries, candidates, log_weights, mask)  # type: ignore[no-untyped-call]
    return result


def padded(candidates: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates and log-weights up to a whole number of cache lines per row of logits.

    The spare columns have weight 0.
    """
    spare = -len(candidates) % _ALIGN
    if spare:
        candidates = torch.nn.functional.pad(candidates, (0, 0, 0, spare))
        log_weights = torch.nn.functional.pad(log_weights, (0, spare), value=-torch.inf)
    return candidates, log_weights


class _MaskedLogSumExp(torch.autograd.Function):
    """Forward tile by tile; backward multiplies the stored or recomputed probabilities.

    Each tile keeps the sum of its exponentials beside what they were shifted by, so tiles of one
    row are independent and meet only in the result: p = exp(logit - shift)·exp(shift - result).
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        candidates: Tensor,
        log_weights: Tensor,
        mask: PairMask | None,
    ) -> Tensor:
        tiles = Tiles(len(queries), len(candidates), queries.device, mask)
        store = 4 * len(queries) * len(candidates) <= _STORE_BYTES
        scratch = borrow(tiles.room(store), queries.device)
        sums = queries.new_empty((len(queries), tiles.num_blocks))
        shifts = queries.new_empty((len(queries), tiles.num_blocks))
        bound = logit_bound(queries, candidates, log_weights)
        weights = log_weights if bound is None else log_weights - bound
        for tile in tiles:
            out = tile.place(scratch, 0 if store else tile.start)
            tile.exponentials(queries, candidates, weights, out, shifts, sums, bound)
        result = joined(sums, shifts)
        ctx.save_for_backward(queries, candidates, log_weights, shifts, result)
        ctx.tiles = tiles
        ctx.kept = scratch if store else None
        if not store:
            give_back(scratch)
        return result.squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        queries, candidates, log_weights, shifts, result = ctx.saved_tensors
        tiles: Tiles = ctx.tiles
        grad = grad_outputs[0].unsqueeze(1)
        grad_queries = torch.zeros_like(queries)
        grad_candidates = torch.zeros_like(candidates)
        grad_weights = torch.zeros_like(log_weights) if ctx.needs_input_grad[2] else None
        # Kept probabilities serve one backward pass; a second one over a retained graph recomputes.
        kept, ctx.kept = ctx.kept, None
        store = kept is not None
        scratch = kept if store else borrow(tiles.room(False), queries.device)
        factors = share_of_row(shifts, result)
        for tile in tiles:
            out = tile.place(scratch, 0 if store else tile.start)
            scale = grad[tile.rows]
            if store:
                scale = scale * factors[tile.rows, tile.block]
            else:
                tile.logits(queries, candidates, log_weights, out)
                _exp(out, result[tile.rows])
                tile.hide(out, 0.0)
            tile.add_gradients(out, scale, queries, candidates, grad_queries, grad_candidates)
            if grad_weights is not None:
                into = grad_weights[tile.columns]
                torch.addmv(into, out.T, scale.squeeze(1), out=into)
        give_back(scratch)
        return grad_queries, grad_candidates, grad_weights, None


def joined(sums: Tensor, shifts: Tensor) -> Tensor:
    """Log of Σ sum·exp(shift) over the blocks of a row, [B, 1]; -inf where all sums are 0."""
    logs = sums.log() + torch.where(sums > 0, shifts, 0.0)
    return logs if logs.shape[1] == 1 else logs.logsumexp(1, keepdim=True)


def share_of_row(shifts: Tensor, result: Tensor) -> Tensor:
    """exp(shift - result), [B, blocks]: what turns a tile's exponentials into probabilities.

    A row or a block without any candidate has probability 0; it must not become NaN.
    """
    some = (shifts > -torch.inf) & (result > -torch.inf)
    return torch.where(some, shifts - result, -torch.inf).exp_()


def logit_bound(queries: Tensor, candidates: Tensor, log_weights: Tensor) -> float | None:
    """What no logit exceeds, where none can lie more than ``_RANGE`` below; None elsewhere.

    With it a tile needs no maximum of its rows and no exponential of something tiny.
    """
    finite = log_weights[log_weights > -torch.inf]
    # On a GPU reading the answer would wait for the device.
    if queries.device.type != "cpu" or not len(queries) or not len(finite):
        return None
    longest = torch.linalg.vector_norm(queries, dim=1).amax()
    longest = longest * torch.linalg.vector_norm(candidates, dim=1).amax()
    bound, span = longest + finite.amax(), 2 * longest + finite.amax() - finite.amin()
    return bound.item() if span.item() <= _RANGE else None


def _exp(out: Tensor, shift: Tensor) -> None:
    """exp(out - shift) in place for shifts [R, 1] that no element exceeds by much."""
    out.sub_(torch.where(shift > -torch.inf, shift, 0.0)).clamp_min_(_SMALLEST).exp_()


def borrow(size: int, device: torch.device) -> Tensor:
    """Uninitialised float32 [size], from the pool where a buffer is large enough."""
    with _pool_lock:
        for position, buffer in enumerate(_pool):
            if buffer.device == device and size <= len(buffer) <= 4 * size:
                return _pool.pop(position)
    # An eighth more than asked for: the number of distinct candidates differs from step to step.
    return torch.empty(size + size // 8, dtype=torch.float32, device=device)


def give_back(buffer: Tensor) -> None:
    """Keep the storage for the next step; two are enough for a symmetric loss."""
    if buffer.device.type == "cpu":
        with _pool_lock:
            _pool.append(buffer)
            del _pool[:-2]


@dataclass(frozen=True)
class Tile:
    """Some rows against some columns.

    Attributes:
        rows, columns, block: where it lies among queries, candidates and the blocks of columns.
        masked: flat places [P] in the tile that take no part; None for none.
    """

    rows: slice
    columns: slice
    block: slice
    start: int
    masked: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def place(self, scratch: Tensor, origin: int) -> Tensor:
        """Its part of a buffer whose first element is number ``origin`` of all tiles' elements."""
        height, width = self.shape
        start = self.start - origin
        return scratch[start : start + height * width].view(height, width)

    def logits(self, queries: Tensor, candidates: Tensor, log_weights: Tensor, out: Tensor) -> None:
        torch.mm(queries[self.rows], candidates[self.columns].T, out=out)
        out.add_(log_weights[self.columns])

    def exponentials(
        self,
        queries: Tensor,
        candidates: Tensor,
        weights: Tensor,
        out: Tensor,
        shifts: Tensor,
        sums: Tensor,
        bound: float | None,
    ) -> None:
        """Fill ``out`` with exp(logit - shift), and this block's column of ``shifts`` and ``sums``.

        Args:
            weights: log-weights, less ``bound`` where there is one. bound: of ``logit_bound``.
        """
        self.logits(queries, candidates, weights, out)
        shift = shifts[self.rows, self.block]
        if bound is None:
            self.hide(out, -torch.inf)
            torch.amax(out, 1, keepdim=True, out=shift)
            _exp(out, shift)
        else:
            shift.fill_(bound)
            out.exp_()
        self.hide(out, 0.0)
        torch.sum(out, 1, keepdim=True, out=sums[self.rows, self.block])

    def add_gradients(
        self,
        out: Tensor,
        scale: Tensor,
        queries: Tensor,
        candidates: Tensor,
        grad_queries: Tensor,
        grad_candidates: Tensor,
        rounded: Tensor | None = None,
    ) -> None:
        """Add what ``scale`` [R, 1] times the exponentials of the tile pull at both sides.

        Args:
            rounded: bfloat16 buffer for the exponentials; with it both products have bfloat16
                factors, float32 sums within the tile, and are rounded before they are added.
        """
        pulled = queries[self.rows] * scale
        into = grad_candidates[self.columns]
        if rounded is None:
            grad_queries[self.rows].addcmul_(out @ candidates[self.columns], scale)
            torch.addmm(into, out.T, pulled, out=into)
            return
        out = rounded[: out.numel()].view(out.shape).copy_(out)
        grad_queries[self.rows].addcmul_(out @ candidates[self.columns].bfloat16(), scale)
        into.add_(out.T @ pulled.bfloat16())

    def hide(self, out: Tensor, value: float) -> None:
        """Write ``value`` at the masked pairs."""
        if self.masked is not None:
            out.view(-1).index_fill_(0, self.masked, value)


class Tiles:
    """All tiles, row by row: blocks of columns of equal width, rows of equal height.

    Args:
        whole_rows: all blocks of a row are needed at a time; they may take somewhat more room.
    """

    def __init__(
        self,
        num_rows: int,
        num_columns: int,
        device: torch.device,
        mask: PairMask | None,
        *,
        whole_rows: bool = False,
    ) -> None:
        self.num_rows, self.num_columns = num_rows, num_columns
        blocks = -(-num_columns // _MAX_WIDTH[device.type])
        self.width = -(-num_columns // (blocks * _ALIGN)) * _ALIGN
        self.num_blocks = -(-num_columns // self.width)
        room, together = _TILE_BYTES[device.type], self.width
        if whole_rows:
            together = num_columns
            room = min(max(room, 4 * _ROWS * num_columns), _MAX_FACTOR * room)
        height = max(16, room // (4 * together))
        self.height = min(height, max(num_rows, 1))
        self.mask = mask

    def room(self, store: bool) -> int:
        """Elements of the buffer that ``Tile.place`` needs."""
        if store:
            return self.num_rows * self.num_columns
        return self.height * min(self.width, self.num_columns)

    def __iter__(self) -> Iterator[Tile]:
        places, bounds = self._places
        number = 0
        for top in range(0, self.num_rows, self.height):
            bottom = min(top + self.height, self.num_rows)
            for block, left in enumerate(range(0, self.num_columns, self.width)):
                right = min(left + self.width, self.num_columns)
                low, high = bounds[number], bounds[number + 1]
                yield Tile(
                    slice(top, bottom),
                    slice(left, right),
                    slice(block, block + 1),
                    top * self.num_columns + (bottom - top) * left,
                    places[low:high] if high > low else None,
                )
                number += 1

    @cached_property
    def _places(self) -> tuple[Tensor, list[int]]:
        """Masked pairs as flat places within their tile, tile by tile, and where each begins."""
        mask = self.mask
        num_tiles = self.num_blocks * -(-self.num_rows // self.height)
        if mask is None:
            return torch.empty(0, dtype=torch.int64), [0] * (num_tiles + 1)
        rows, columns = mask.rows, mask.columns
        top, left = rows // self.height, columns // self.width
        widths = (self.num_columns - left * self.width).clamp(max=self.width)
        # One flat index: filling by (row, column) costs ten times as much.
        places = (rows - top * self.height) * widths + columns - left * self.width
        tile = top * self.num_blocks + left
        if self.num_blocks > 1:
            # Rows rise, so with one block tiles rise already.
            tile, order = tile.sort(stable=True)
            places = places[order]
        edges = torch.arange(num_tiles + 1, device=tile.device)
        return places, torch.searchsorted(tile, edges).tolist()
