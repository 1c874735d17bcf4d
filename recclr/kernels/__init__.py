"""Differentiable primitives whose plain PyTorch form loses its time in memory traffic.

``masked_logsumexp``, under every objective, has twins that agree in value and gradient: ``tiled``
runs from a CPU's cache and never needs B × N to survive in slow memory; ``triton_logsumexp`` keeps
its tiles in a GPU's registers; ``reference`` is plain PyTorch, the oracle of the tests.
``total_contrastive_loss`` is the loss above it with its gradient in one pass, ``unit_rows`` the
normalisation of cosine similarity.
"""

from recclr.kernels.fused import either, total_contrastive_loss
from recclr.kernels.logsumexp import masked_logsumexp
from recclr.kernels.reference import BitMask, Mask, PairMask
from recclr.kernels.unit import unit_rows

__all__ = [
    "BitMask",
    "Mask",
    "PairMask",
    "either",
    "masked_logsumexp",
    "total_contrastive_loss",
    "unit_rows",
]
