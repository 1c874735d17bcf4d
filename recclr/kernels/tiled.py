"""Masked, weighted log-sum-exp in tiles of query rows.

Shape letters: B queries, C candidates, D dimension, R rows of a tile.

Cost (performance.md §3 (i)): 6·B·C·D multiply-adds and B·C exponentials when the probabilities fit
``_STORE_BYTES``, 8·B·C·D and 2·B·C with recomputation beyond that; memory then grows with B + C
only. The tile of logits (R × C) is written, exponentiated and read while it is in cache: plain
PyTorch loses its time in allocating and streaming B × C, not in arithmetic.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import torch
from torch import Tensor

from recclr.kernels.reference import PairMask

# One tile of logits. On a CPU it exceeds the second-level cache: larger GEMMs gain more than the
# passes in between lose (7.1 ms against 8.2 ms with 1 MiB, B = 2048). On a GPU it bounds memory.
_TILE_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
_ALIGN = 16
# Up to here keeping the probabilities for the backward pass is cheaper than a second GEMM
# (measured: 18 ms against 21 ms at B = 8192, C = 1024, D = 64 on two cores).
_STORE_BYTES = 1 << 27
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
    spare = -len(candidates) % _ALIGN
    if spare:
        # Rows of logits that start on a cache line; the spare columns have weight 0.
        candidates = torch.nn.functional.pad(candidates, (0, 0, 0, spare))
        log_weights = torch.nn.functional.pad(log_weights, (0, spare), value=-torch.inf)
    rows, columns = (mask.rows, mask.columns) if mask is not None else (None, None)
    result: Tensor = _MaskedLogSumExp.apply(queries, candidates, log_weights, rows, columns)  # type: ignore[no-untyped-call]
    return result


class _MaskedLogSumExp(torch.autograd.Function):
    """Forward tile by tile; backward multiplies the stored or recomputed probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        candidates: Tensor,
        log_weights: Tensor,
        rows: Tensor | None,
        columns: Tensor | None,
    ) -> Tensor:
        tiles = _Tiles(len(queries), len(candidates), queries.device, rows, columns)
        store = tiles.total_bytes <= _STORE_BYTES
        num_rows = len(queries) if store else tiles.height
        scratch = _borrow(num_rows, len(candidates), queries.device)
        sums = queries.new_empty((len(queries), 1))
        peaks = queries.new_empty((len(queries), 1))
        transposed = candidates.T.contiguous()
        bound = _bound(queries, candidates, log_weights)
        weights = log_weights if bound is None else log_weights - bound
        if bound is not None:
            peaks.fill_(bound)
        for start, stop in tiles.ranges():
            out = scratch[start:stop] if store else scratch[: stop - start]
            tiles.logits(queries, transposed, weights, start, stop, out)
            if bound is None:
                tiles.hide(out, start, -torch.inf)
                peaks[start:stop] = out.amax(1, keepdim=True)
                _exp(out, peaks[start:stop])
            else:
                out.exp_()
            tiles.hide(out, start, 0.0)
            torch.sum(out, 1, keepdim=True, out=sums[start:stop])
        if bound is None:
            sums.masked_fill_(peaks == -torch.inf, 0.0)
        result = sums.log().add_(peaks).squeeze(1)
        ctx.save_for_backward(queries, candidates, log_weights, sums, result)
        ctx.tiles = tiles
        ctx.kept = scratch if store else None
        if not store:
            _give_back(scratch)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        queries, candidates, log_weights, sums, result = ctx.saved_tensors
        tiles: _Tiles = ctx.tiles
        grad = grad_outputs[0].unsqueeze(1)
        grad_queries = torch.empty_like(queries)
        grad_candidates = torch.zeros_like(candidates)
        grad_weights = torch.zeros_like(log_weights) if ctx.needs_input_grad[2] else None
        # Kept probabilities serve one backward pass; a second one over a retained graph recomputes.
        kept, ctx.kept = ctx.kept, None
        store = kept is not None
        scratch = kept if store else _borrow(tiles.height, len(candidates), queries.device)
        transposed = candidates.T.contiguous()
        # A row without any candidate has sum 0 and probability 0; it must not become NaN.
        scale = grad / sums.clamp_min(1e-30) if store else grad
        shift = result.unsqueeze(1)
        for start, stop in tiles.ranges():
            out = scratch[start:stop] if store else scratch[: stop - start]
            if not store:
                tiles.logits(queries, transposed, log_weights, start, stop, out)
                _exp(out, shift[start:stop])
                tiles.hide(out, start, 0.0)
            row_scale = scale[start:stop]
            torch.mm(out, candidates, out=grad_queries[start:stop])
            grad_queries[start:stop].mul_(row_scale)
            torch.addmm(
                grad_candidates, out.T, queries[start:stop] * row_scale, out=grad_candidates
            )
            if grad_weights is not None:
                torch.addmv(grad_weights, out.T, row_scale.squeeze(1), out=grad_weights)
        _give_back(scratch)
        return grad_queries, grad_candidates, grad_weights, None, None


def _bound(queries: Tensor, candidates: Tensor, log_weights: Tensor) -> float | None:
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


def _borrow(num_rows: int, num_columns: int, device: torch.device) -> Tensor:
    """Uninitialised float32 [num_rows, num_columns], from the pool where one is large enough."""
    size = num_rows * num_columns
    with _pool_lock:
        for position, buffer in enumerate(_pool):
            if buffer.device == device and size <= len(buffer) <= 4 * size:
                return _pool.pop(position)[:size].view(num_rows, num_columns)
    # An eighth more than asked for: the number of distinct candidates differs from step to step.
    whole = torch.empty(size + size // 8, dtype=torch.float32, device=device)
    return whole[:size].view(num_rows, num_columns)


def _give_back(buffer: Tensor) -> None:
    """Keep the storage for the next step; two are enough for a symmetric loss."""
    if buffer.device.type == "cpu":
        storage = buffer.untyped_storage()
        whole = torch.empty(0, dtype=torch.float32).set_(storage)
        with _pool_lock:
            _pool.append(whole)
            del _pool[:-2]


class _Tiles:
    """Row ranges of equal height, and the masked logits of one range."""

    def __init__(
        self,
        num_rows: int,
        num_columns: int,
        device: torch.device,
        rows: Tensor | None,
        columns: Tensor | None,
    ) -> None:
        self.num_rows = num_rows
        self.total_bytes = 4 * num_rows * num_columns
        self.height = min(max(16, _TILE_BYTES[device.type] // (4 * num_columns)), max(num_rows, 1))
        self.rows, self.columns = rows, columns
        starts = [start for start, _ in self.ranges()] + [num_rows]
        self.bounds = [0] * len(starts)
        if rows is not None:
            edges = torch.tensor(starts, dtype=rows.dtype, device=rows.device)
            self.bounds = torch.searchsorted(rows, edges).tolist()

    def ranges(self) -> list[tuple[int, int]]:
        return [
            (start, min(start + self.height, self.num_rows))
            for start in range(0, self.num_rows, self.height)
        ]

    def logits(
        self,
        queries: Tensor,
        transposed: Tensor,
        log_weights: Tensor,
        start: int,
        stop: int,
        out: Tensor,
    ) -> None:
        torch.mm(queries[start:stop], transposed, out=out)
        out.add_(log_weights)

    def hide(self, out: Tensor, start: int, value: float) -> None:
        """Write ``value`` at the masked pairs of the tile that begins at row ``start``."""
        tile = start // self.height
        low, high = self.bounds[tile], self.bounds[tile + 1]
        if self.rows is not None and self.columns is not None and high > low:
            # One flat index: filling by (row, column) costs ten times as much.
            width = out.shape[1]
            flat = (self.rows[low:high] - start) * width + self.columns[low:high]
            out.view(-1).index_fill_(0, flat, value)
