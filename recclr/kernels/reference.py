"""Masked, weighted log-sum-exp of queries against candidates in plain PyTorch.

Shape letters: B queries, C candidates, D dimension, P masked pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORD_BITS = 32


@dataclass(frozen=True)
class PairMask:
    """Query-candidate pairs that take no part.

    Attributes:
        rows: int64 [P], rising. columns: int64 [P]. P may be 0; a pair may repeat.
    """

    rows: Tensor
    columns: Tensor

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class BitMask:
    """The same as one bit for each pair: B·C / 8 bytes, whatever is masked.

    Attributes:
        words: int32 [B, ceil(C / 32)]; bit c % 32 of word c // 32 says that candidate c takes no
            part in the row. Bits from C on mean nothing.
    """

    words: Tensor

    @classmethod
    def from_dense(cls, hidden: Tensor) -> BitMask:
        """From bool [B, C]."""
        num_queries, num_candidates = hidden.shape
        width = -(-num_candidates // WORD_BITS)
        bits = hidden.new_zeros((num_queries, width * WORD_BITS), dtype=torch.int64)
        bits[:, :num_candidates] = hidden
        weights = 1 << torch.arange(WORD_BITS, device=hidden.device)
        words = (bits.view(num_queries, width, WORD_BITS) * weights).sum(2)
        # Bit 31 becomes the sign: the cast keeps the lower half.
        return cls(words.int())

    def dense(self, num_candidates: int) -> Tensor:
        """Bool [B, num_candidates]."""
        columns = torch.arange(num_candidates, device=self.words.device)
        words = self.words.index_select(1, columns // WORD_BITS)
        return (words >> (columns % WORD_BITS)) & 1 != 0


Mask = PairMask | BitMask


def masked_logsumexp_reference(
    queries: Tensor, candidates: Tensor, log_weights: Tensor, mask: Mask | None = None
) -> Tensor:
    """Log Σ_j exp(⟨query, candidate_j⟩ + log_weight_j) over the candidates not masked.

    Args:
        queries: float32 [B, D], already divided by the temperature.
        candidates: float32 [C, D].
        log_weights: float32 [C]; minus the candidate's log_q, in the usual case.
        mask: pairs to leave out.

    Returns:
        float32 [B]; -inf, with zero gradient, where every candidate is masked or C is 0.
    """
    logits = queries @ candidates.T + log_weights
    if isinstance(mask, BitMask):
        logits = logits.masked_fill(mask.dense(len(candidates)), -torch.inf)
    elif mask is not None and len(mask):
        dead = torch.zeros_like(logits, dtype=torch.bool)
        dead[mask.rows, mask.columns] = True
        logits = logits.masked_fill(dead, -torch.inf)
    if logits.shape[1] == 0:
        return logits.new_full((len(logits),), -torch.inf)
    alive = (logits > -torch.inf).any(1)
    # logsumexp of an all-masked row has a NaN gradient; such a row is taken out before it.
    safe = torch.where(alive[:, None], logits, torch.zeros_like(logits))
    return torch.where(alive, torch.logsumexp(safe, 1), -torch.inf)
