"""The score above which lie a row's best K items of the catalogue, and weights that follow from it.

Shape letters: B rows, C candidates, M candidates that a row has for itself, D dimension, P
positives of a row.

SL@K (Yang et al., KDD 2025) weights the softmax loss of each positive by how near it is to the
row's top K, since positives far below count for no metric that is cut off at K. The paper scores
samples every few epochs and keeps a quantile for every user. Here the quantile is that of the step,
estimated from what the step scores in any case:

* A candidate stands for as many items of the catalogue as its weight says (draws over expected
  count), so the number of items above a score is estimated without bias for any mixture of
  sources; with ``log_q_strength`` below 1 the weights are no counts, and K means less.
* There is no state to keep and nothing is out of date; in return it is noisier, by the number of
  candidates near the top: the best of 1,024 uniform ones stands for 20 items of 20,000.
* The user's known positives are left out, as they are when the model is judged and serves; the
  paper ranks its positives among the others.

Weights are not normalised, as in the paper: a batch of positives that are all far below the top
moves the model less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recclr.kernels.reference import BitMask, Mask
from recclr.losses import products_of_own

# Scores of a block of rows; on a CPU they stay in cache between their product and their top.
_BLOCK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}

# Vectors [U, D], rows of these [B, M] and log-weights [B, M], of candidates of single rows.
Own = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def top_k_weights(
    scores_BP: Tensor,
    queries: Tensor,
    candidates: Tensor,
    log_weights: Tensor,
    mask: Mask,
    own: Own | None,
    *,
    top_k: int,
    temperature: float,
) -> Tensor:
    """Sigmoid of (score of the positive - quantile of its row) / temperature, float32 [B, P].

    Has no gradient. 1 where a row has candidates for no more than K items.

    Args:
        scores_BP: float32 [B, P], of positives; not divided by the temperature of the loss.
        top_k, temperature: K, and over which scores the weight falls.
        queries, candidates, log_weights, mask, own: as ``top_k_quantiles`` has them.
    """
    quantiles = top_k_quantiles(queries, candidates, log_weights, mask, own, top_k=top_k)
    return torch.sigmoid((scores_BP - quantiles.unsqueeze(1)) / temperature)


@torch.no_grad()
def top_k_quantiles(
    queries: Tensor,
    candidates: Tensor,
    log_weights: Tensor,
    mask: Mask,
    own: Own | None,
    *,
    top_k: int,
) -> Tensor:
    """The smallest score above which no more than ``top_k`` items are estimated, float32 [B].

    In blocks of rows: of the B × C scores only those of a block are ever held. Of these, no more
    are sorted than K items can need; reading how many that is waits for a GPU.

    Args:
        queries: float32 [B, D]. candidates: float32 [C, D]; C may be 0.
        log_weights: float32 [C], log of the number of items that each stands for.
        mask: pairs that are left out. own: candidates of single rows, or None.

    Returns:
        A score of one of the row's candidates; -inf where all of them stand for no more than K.
    """
    result = queries.new_empty(len(queries))
    own_width = 0 if own is None else own[1].shape[1]
    depth = _depth(log_weights, own, top_k, len(candidates) + own_width)
    height = max(1, _BLOCK_BYTES[queries.device.type] // (4 * max(len(candidates), 1)))
    shared = log_weights.exp()
    for top in range(0, len(queries), height):
        rows = slice(top, min(top + height, len(queries)))
        scores = queries[rows] @ candidates.T
        scores.masked_fill_(shared == 0, -torch.inf)
        _hide(scores, mask, rows)
        weights = shared.expand(len(scores), -1)
        if own is not None:
            vectors, own_row, own_log_weights = own
            own_weights = own_log_weights[rows].exp()
            own_scores = products_of_own(queries[rows], vectors, own_row[rows])
            own_scores.masked_fill_(own_weights == 0, -torch.inf)
            scores = torch.cat([scores, own_scores], 1)
            weights = torch.cat([weights, own_weights], 1)
        result[rows] = _weighted_quantiles(scores, weights, depth, top_k)
    return result


def _weighted_quantiles(scores: Tensor, weights: Tensor, depth: int, top_k: int) -> Tensor:
    """Of each row; -inf for a score without weight. [R, W] both."""
    if not depth:
        return scores.new_full((len(scores),), -torch.inf)
    best, columns = scores.topk(depth, dim=1)
    counts = weights.gather(1, columns).masked_fill(best == -torch.inf, 0.0).cumsum(1)
    # exp(log w) may be a rounding more than the number of items it is.
    over = counts > top_k * (1 + 1e-5)
    first = over.int().argmax(1, keepdim=True)
    return best.gather(1, first).squeeze(1).where(over.any(1), -torch.inf)


def _depth(log_weights: Tensor, own: Own | None, top_k: int, width: int) -> int:
    """How many of the best candidates stand for more than ``top_k`` items in any case."""
    every = log_weights if own is None else torch.cat([log_weights, own[2].reshape(-1)])
    every = every[every > -torch.inf]
    if not len(every):
        return 0
    least = every.amin().double().exp().item()
    # One more than by division, which a sum of float32 may fall short of.
    return min(width, int(min(top_k / least, width)) + 2)


def _hide(scores: Tensor, mask: Mask, rows: slice) -> None:
    """Write -inf at the masked pairs of some rows, [R, C]."""
    if isinstance(mask, BitMask):
        scores.masked_fill_(BitMask(mask.words[rows]).dense(scores.shape[1]), -torch.inf)
        return
    edges = torch.tensor([rows.start, rows.stop], device=mask.rows.device)
    low, high = torch.searchsorted(mask.rows, edges).tolist()
    scores[mask.rows[low:high] - rows.start, mask.columns[low:high]] = -torch.inf
