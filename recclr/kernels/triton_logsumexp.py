"""Masked, weighted log-sum-exp on a GPU: the ``cuda`` twin, in Triton.

Shape letters: B queries, C candidates, D dimension, P masked pairs.

Cost (performance.md §3 (i)): 8·B·C·D multiply-adds over forward and backward, 3·B·C exponentials,
since either side's gradient recomputes the probabilities from the stored result rather than adding
to memory that other programs write. Memory grows with B·D + C·D + P, or B·C / 32 with a mask of
bits: tiles stay in registers, and the few parts that a walk is split into when there are not enough
blocks for the device are bounded by the device's size. Nothing waits for the device and every shape
follows from B, C, D and P, so a step with it can be captured as a CUDA graph.

Importing this module needs Triton; ``kernels.logsumexp`` does so where there is a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from recclr.kernels.reference import BitMask, Mask
from recclr.kernels.triton_kernels import gradient_kernel, logsumexp_kernel

# Above it a block of rows and its gradient no longer fit the registers of a program.
MAX_DIM = 256
# Programs for each multiprocessor, so that one computes while another waits for memory.
_PER_PROCESSOR = 2
# tl.dot rounds float32 to TensorFloat-32 (10 bits of mantissa) unless told not to.
_PRECISION = "ieee"


@dataclass(frozen=True)
class Blocks:
    """Rows of a program's block and of a tile of its walk; warps; stages of loads in flight."""

    size: int
    tile: int
    num_warps: int
    num_stages: int


# By the largest dimension they are for. The largest that need no more than 80 KiB of shared memory
# and next to no register spills, by ptxas for sm_80 and sm_90; not yet timed on a device.
_BLOCKS = {
    torch.bfloat16: {
        64: Blocks(128, 64, num_warps=8, num_stages=3),
        128: Blocks(64, 64, num_warps=8, num_stages=2),
        MAX_DIM: Blocks(64, 32, num_warps=8, num_stages=2),
    },
    # Without tensor cores a product holds its operands in registers as well.
    torch.float32: {
        64: Blocks(64, 64, num_warps=8, num_stages=2),
        128: Blocks(64, 32, num_warps=8, num_stages=2),
        MAX_DIM: Blocks(32, 32, num_warps=8, num_stages=2),
    },
}


def masked_logsumexp_triton(
    queries: Tensor,
    candidates: Tensor,
    log_weights: Tensor,
    mask: Mask | None = None,
    *,
    bfloat16: bool = False,
) -> Tensor:
    """As ``masked_logsumexp``, for arguments that it has checked and D from 1 to ``MAX_DIM``.

    Second derivatives are refused.
    """
    rows = columns = words = None
    if isinstance(mask, BitMask):
        words = mask.words.contiguous()
    elif mask is not None and len(mask):
        rows, columns = mask.rows, mask.columns
    result: Tensor = _MaskedLogSumExp.apply(  # type: ignore[no-untyped-call]
        queries, candidates, log_weights, rows, columns, words, bfloat16
    )
    return result


class _MaskedLogSumExp(torch.autograd.Function):
    """One launch forward, one for each side's gradient backward."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        candidates: Tensor,
        log_weights: Tensor,
        rows: Tensor | None,
        columns: Tensor | None,
        words: Tensor | None,
        bfloat16: bool,
    ) -> Tensor:
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        # Rounded once here: a cast in the kernel would be repeated for every tile.
        queries, candidates = queries.to(dtype).contiguous(), candidates.to(dtype).contiguous()
        log_weights = log_weights.contiguous()
        walk = _Walk.plan(queries, candidates, rows, columns, words)
        results = log_weights.new_empty((walk.num_parts, len(queries)))
        walk.launch(logsumexp_kernel, queries, candidates, log_weights, results)
        result = results[0] if walk.num_parts == 1 else results.logsumexp(0)
        ctx.save_for_backward(queries, candidates, log_weights, rows, columns, words, result)
        ctx.walk = walk
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # once_differentiable would drop them where nothing that is upstream needs a gradient.
            raise RuntimeError("masked_logsumexp supports automatic differentiation only once")
        queries, candidates, log_weights, rows, columns, words, result = ctx.saved_tensors
        # A row without any candidate: its logits are -inf, and no shift may make them NaN.
        empty = result == -torch.inf
        upstream = grad_outputs[0].masked_fill(empty, 0.0).contiguous()
        shifts = result.neg().masked_fill_(empty, 0.0)
        grad_queries = grad_candidates = grad_weights = None
        if ctx.needs_input_grad[0]:
            walk: _Walk = ctx.walk
            grad_queries, _ = walk.gradient(
                queries, candidates, shifts, log_weights, upstream, of_queries=True
            )
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            walk = _Walk.plan(candidates, queries, columns, rows, words)
            grad_candidates, grad_weights = walk.gradient(
                candidates, queries, log_weights, shifts, upstream, of_queries=False
            )
        return grad_queries, grad_candidates, grad_weights, None, None, None, None


@dataclass(frozen=True)
class _Walk:
    """Blocks of one side ("own"), each walking the other side in parts of so many tiles.

    ``pairs``: own rows, other rows and edges as ``_sorted_pairs`` gives them. ``words``: of a
    ``BitMask``.
    """

    num_own: int
    num_other: int
    blocks: Blocks
    num_parts: int
    tiles_per_part: int
    pairs: tuple[Tensor, Tensor, Tensor] | None
    words: Tensor | None

    @classmethod
    def plan(
        cls,
        own: Tensor,
        other: Tensor,
        owns: Tensor | None,
        others: Tensor | None,
        words: Tensor | None,
    ) -> _Walk:
        """From both sides' rows and the masked pairs; all but ``pairs`` follows from shapes."""
        blocks = _blocks_for(own.shape[1], own.dtype)
        num_blocks = triton.cdiv(len(own), blocks.size)
        num_tiles = max(1, triton.cdiv(len(other), blocks.tile))
        wanted = triton.cdiv(_num_programs(own.device), max(1, num_blocks))
        tiles_per_part = triton.cdiv(num_tiles, min(num_tiles, wanted))
        num_parts = triton.cdiv(num_tiles, tiles_per_part)
        pairs = None
        if owns is not None and others is not None:
            span = tiles_per_part * blocks.tile
            pairs = _sorted_pairs(owns, others, blocks.size, span, num_blocks, num_parts)
        return cls(len(own), len(other), blocks, num_parts, tiles_per_part, pairs, words)

    def launch(self, kernel: Any, *tensors: Tensor, **options: bool) -> None:
        own = tensors[0]
        blocks, dim = self.blocks, own.shape[1]
        # Triton launches on the current device, whatever device its arguments are on.
        with torch.cuda.device_of(own):  # type: ignore[no-untyped-call]
            kernel[(triton.cdiv(self.num_own, blocks.size), self.num_parts)](
                *tensors,
                *(self.pairs or (own, own, own)),
                own if self.words is None else self.words,
                self.num_own,
                self.num_other,
                self.tiles_per_part,
                0 if self.words is None else self.words.shape[1],
                D=dim,
                PAD_D=max(16, triton.next_power_of_2(dim)),
                SIZE=blocks.size,
                TILE=blocks.tile,
                PAIRS=self.pairs is not None,
                BITS=self.words is not None,
                ONE=tl.float32 if own.dtype == torch.float32 else tl.float16,
                PRECISION=_PRECISION,
                WIDEN=own.device.type == "cpu",
                enable_fp_fusion=True,
                num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
                **options,
            )

    def gradient(
        self,
        own: Tensor,
        other: Tensor,
        own_shifts: Tensor,
        other_shifts: Tensor,
        upstream: Tensor,
        *,
        of_queries: bool,
    ) -> tuple[Tensor, Tensor]:
        """Float32 gradients of own rows, and of their log_weights where those are candidates."""
        gradients = upstream.new_empty((self.num_parts, *own.shape))
        totals = upstream.new_empty((self.num_parts, len(own)))
        self.launch(
            gradient_kernel,
            own,
            other,
            own_shifts,
            other_shifts,
            upstream,
            gradients,
            totals,
            OF_QUERIES=of_queries,
        )
        if self.num_parts == 1:
            return gradients[0], totals[0]
        return gradients.sum(0), totals.sum(0)


def _sorted_pairs(
    owns: Tensor, others: Tensor, size: int, span: int, num_blocks: int, num_parts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The masked pairs in the order in which programs meet them.

    Args:
        owns, others: int64 [P], the rows of each pair on either side.
        size: rows of a block. span: other rows of a part.

    Returns:
        own rows and other rows, int32 [P], by block and then by other row; edges, int32
        [num_blocks · num_parts + 1], the range of each program (block, part).
    """
    width = num_parts * span
    keys = owns // size * width + others
    if num_blocks * width < 2**31:
        # Half the passes of the radix sort.
        keys = keys.int()
    keys, order = keys.sort()
    starts = torch.arange(0, num_blocks * width + 1, span, dtype=keys.dtype, device=keys.device)
    edges = torch.searchsorted(keys, starts, out_int32=True)
    return owns[order].int(), others[order].int(), edges


def _num_programs(device: torch.device) -> int:
    """How many programs keep the device busy."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return _PER_PROCESSOR * count


def _blocks_for(dim: int, dtype: torch.dtype) -> Blocks:
    return next(blocks for most, blocks in _BLOCKS[dtype].items() if dim <= most)
