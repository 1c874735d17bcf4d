"""Rows scaled to length 1: one pass each way by the compiled kernels, five in all in PyTorch, where
autograd's composition takes fourteen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recclr.kernels import native, native_rows

_EPSILON = 1e-12


def unit_rows(x: Tensor) -> Tensor:
    """``x`` / max(‖row‖, 1e-12), float32 [M, D]; a row of zeros stays one.

    Args:
        x: float [M, D]. M may be 0.
    """
    result: Tensor = _UnitRows.apply(x.float())  # type: ignore[no-untyped-call]
    return result


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kernels = native.usable(x)
        if kernels is not None:
            unit, lengths = native_rows.unit(kernels, x)
        else:
            lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(_EPSILON)
            unit = x / lengths
        ctx.save_for_backward(unit, lengths)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        grad: Tensor = grad_outputs[0]
        unit, lengths = ctx.saved_tensors
        kernels = native.usable(grad)
        if kernels is not None:
            return native_rows.unit_backward(kernels, grad, unit, lengths)
        # What points along the row changes its length only.
        along = torch.linalg.vecdot(grad, unit, dim=1).unsqueeze(1)
        result: Tensor = torch.addcmul(grad, unit, along, value=-1).div_(lengths)
        return result
