"""The one primitive under every objective, in twins that agree in value and gradient.

``masked_logsumexp`` picks the twin: ``tiled`` runs from cache and never needs B × N to survive in
slow memory; ``reference`` is plain PyTorch, the oracle of the tests.
"""

from recclr.kernels.reference import PairMask
from recclr.kernels.tiled import masked_logsumexp

__all__ = ["PairMask", "masked_logsumexp"]
