"""The log-sum-exp under every objective: arguments checked once, then the twin for the device.

Shape letters: B queries, C candidates, D dimension.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from recclr.errors import ShapeError
from recclr.kernels import native
from recclr.kernels.grouped import GroupMask, group_parts
from recclr.kernels.native_softmax import masked_logsumexp_native
from recclr.kernels.reference import BitMask, Mask, masked_logsumexp_reference
from recclr.kernels.tiled import masked_logsumexp_tiled


class _Twin(Protocol):
    def __call__(
        self, queries: Tensor, candidates: Tensor, log_weights: Tensor, mask: Mask | None
    ) -> Tensor: ...


def masked_logsumexp(
    queries: Tensor,
    candidates: Tensor,
    log_weights: Tensor,
    mask: Mask | None = None,
    *,
    bfloat16: bool = False,
) -> Tensor:
    """As ``masked_logsumexp_reference``, which has the definition of arguments and result.

    On a GPU with Triton, for D up to 256, in Triton's kernels: nothing waits for the device, and
    shapes follow from those of the arguments. On a CPU by the compiled kernels, where recclr was
    installed with them; everywhere else in tiles of PyTorch, or plainly with a ``BitMask``, whose
    B × C logits then lie in memory; a ``GroupMask`` in tiles of one group.

    Args:
        queries, candidates, log_weights, mask: as there.
        bfloat16: lets Triton's kernels multiply in bfloat16 with float32 sums, which tensor cores
            do some ten times faster; queries, candidates and probabilities are then rounded to 8
            bits. The other twin computes in float32 all the same.

    Raises:
        ShapeError: shapes do not belong together, or something is not float32.
    """
    require_shapes(queries, candidates, log_weights)
    if len(candidates) == 0:
        return queries.new_full((len(queries),), -torch.inf)
    twin = _triton_for(queries.device, queries.shape[1], bfloat16)
    if twin is not None:
        return twin(queries, candidates, log_weights, mask)
    if isinstance(mask, GroupMask) and len(queries):
        parts, places = group_parts([queries], candidates, log_weights, mask)
        found = [
            masked_logsumexp(part.by_row[0], part.candidates, part.log_weights, part.pairs)
            for part in parts
        ]
        return torch.cat(found).index_select(0, places)
    if isinstance(mask, BitMask):
        return masked_logsumexp_reference(queries, candidates, log_weights, mask)
    kernels = native.usable(queries, candidates, log_weights)
    if kernels is not None:
        return masked_logsumexp_native(queries, candidates, log_weights, mask, kernels)
    return masked_logsumexp_tiled(queries, candidates, log_weights, mask)


def why_not_triton(dim: int) -> str | None:
    """What keeps a GPU from the kernels in Triton for rows of so many numbers; None for nothing."""
    if not _has_triton():
        return "Triton is not installed"
    from recclr.kernels.triton_logsumexp import MAX_DIM

    return None if 1 <= dim <= MAX_DIM else f"Triton's kernels are for 1 to {MAX_DIM} dimensions"


def require_shapes(queries: Tensor, candidates: Tensor, log_weights: Tensor) -> None:
    """Refuse arguments that do not fit each other, or are not float32, with a ShapeError."""
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise ShapeError(
            f"expected queries [B, D] and candidates [C, D], found {tuple(queries.shape)} and "
            f"{tuple(candidates.shape)}"
        )
    if not queries.dtype == candidates.dtype == log_weights.dtype == torch.float32:
        raise ShapeError(
            f"expected float32, found queries {queries.dtype}, candidates {candidates.dtype}, "
            f"log_weights {log_weights.dtype}"
        )
    if log_weights.shape != candidates.shape[:1]:
        # Checked, not broadcast: a [B, 1] weight would shift rows, which softmax cannot see.
        raise ShapeError(
            f"log_weights needs one value per candidate: expected {tuple(candidates.shape[:1])}, "
            f"found {tuple(log_weights.shape)}"
        )


def _triton_for(device: torch.device, dim: int, bfloat16: bool) -> _Twin | None:
    if device.type != "cuda" or why_not_triton(dim) is not None:
        return None
    from recclr.kernels.triton_logsumexp import masked_logsumexp_triton

    return partial(masked_logsumexp_triton, bfloat16=bfloat16)


@cache
def _has_triton() -> bool:
    """Whether Triton imports. PyTorch for CUDA brings it along on Linux."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
