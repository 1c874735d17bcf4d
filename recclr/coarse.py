"""Exact top-k by way of bfloat16 scores, whose error has a bound.

Shape letters: Q queries, V corpus, D dimension, K cut-off, R rows of a tile, G groups of a tile.

A bfloat16 GEMM runs two to three times as fast as a float32 one and writes half the bytes. Its
scores only decide which pairs are looked at again: with ε a bound on their error, an item of coarse
score below (K-th largest coarse score) - 2·ε cannot be among the K best. What is left, a few dozen
pairs per query, is scored in float32. The result is that of float32, ties included, whatever the
vectors; where the bound leaves too much, the query is handed back.

The bound. With q + δq and c + δc the rounded vectors, the float32 sum of their products differs
from ⟨q, c⟩ by at most ‖δq‖·‖c‖ + ‖q + δq‖·‖δc‖ (Cauchy-Schwarz, with norms that are measured) and
D·2^-24 of the summing; rounding it to bfloat16 adds 2^-8 of itself. Queries are scaled to length 1
and the corpus by its largest norm, so that no product of note underflows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recclr.ranking import TopK

_FOLD = 32
# Columns scored and folded together: 256 × 4,096 coarse scores fit two cores' second-level cache.
_BLOCK = 4096
_UNIT = 2.0**-8
# Lower half of a sort key, and the key of an empty place.
_LOW = (1 << 32) - 1
_NOTHING = -(1 << 63)


def supports_bfloat16(device: torch.device) -> bool:
    """Whether a bfloat16 GEMM of ``device`` sums in float32 and is faster than a float32 one.

    Only a CPU with AVX-512 bfloat16 has been measured. A GPU keeps to float32: cuBLAS may sum in
    bfloat16, which the bound does not cover.
    """
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def smallest_corpus(k: int) -> int:
    """Items from which coarse scores pay; also many more groups than K, as the bound needs."""
    return max(8192, 8 * k * _FOLD)


def _most_groups(k: int) -> int:
    """Above so many groups to look at for a query, float32 scores of everything are cheaper."""
    return 64 + 8 * k


@dataclass(frozen=True)
class CoarseCorpus:
    """A slice of the corpus, ready for coarse scores.

    Column j + f·w of a block of w·``_FOLD`` columns belongs to the block's group j; the last block
    is filled up with zero vectors to a whole number of groups.

    Attributes:
        vectors: float32 [V, D], unscaled. blocks: bfloat16 [D, w·_FOLD] each, scaled.
        group_norm, group_rounding: float32 [G], largest ‖c‖ and ‖δc‖ of a group's items, scaled.
        scale: what the blocks were divided by.
    """

    vectors: Tensor
    blocks: list[Tensor]
    group_norm: Tensor
    group_rounding: Tensor
    scale: Tensor

    @classmethod
    def build(cls, vectors: Tensor) -> CoarseCorpus | None:
        """None where a vector is not finite or all are zero: nothing to bound."""
        norms = torch.linalg.vector_norm(vectors, dim=1)
        scale = norms.amax()
        if not torch.isfinite(scale) or scale == 0:
            return None
        spare = -len(vectors) % _FOLD
        scaled = torch.nn.functional.pad(vectors / scale, (0, 0, 0, spare))
        rounded = scaled.to(torch.bfloat16)
        norms = torch.nn.functional.pad(norms / scale, (0, spare))
        rounding = torch.linalg.vector_norm(rounded.float() - scaled, dim=1)
        blocks = [block.T.contiguous() for block in torch.split(rounded, _BLOCK)]

        def per_group(values: Tensor) -> Tensor:
            parts = torch.split(values, _BLOCK)
            return torch.cat([part.view(_FOLD, -1).amax(0) for part in parts])

        return cls(vectors, blocks, per_group(norms), per_group(rounding), scale)

    def error(self, query_rounding: Tensor) -> Tensor:
        """ε per group, float32 [G], but for the last rounding; ``query_rounding``: [R], ‖δq‖."""
        worst = query_rounding.amax()
        summing = 2.0**-23 * (len(self.blocks[0]) + 8)
        # Twice the unit of float32 per term also covers that all this is computed in float32.
        return (worst + summing) * self.group_norm + (1 + worst) * self.group_rounding + 1e-30

    def buffer(self, num_rows: int) -> Tensor:
        """Room for the scores of a tile, one block after the other."""
        return self.blocks[0].new_empty(num_rows * len(self.group_norm) * _FOLD)


@dataclass(frozen=True)
class Pairs:
    """Scored (row, column) pairs in the order of their rows; float32 scores."""

    rows: Tensor
    columns: Tensor
    scores: Tensor


def coarse_top_k(
    queries: Tensor,
    corpus: CoarseCorpus,
    k: int,
    buffer: Tensor,
    *,
    hidden: tuple[Tensor, Tensor] | None = None,
    floor: Tensor | None = None,
) -> tuple[TopK, Tensor]:
    """The K best columns of each query, exactly, but for the queries that are handed back.

    Args:
        queries: float32 [R, D].
        buffer: of ``corpus.buffer``, for at least R rows.
        hidden: int64 (row, column) pairs that take no part.
        floor: float32 [R]: scores below it are of no interest (the K-th best found elsewhere).

    Returns:
        Columns and scores, and int64 [M], rising: rows left open, whose results are void. They are
        those whose bound separates too little, and those without a direction (zero, not finite).
    """
    norms = torch.linalg.vector_norm(queries, dim=1, keepdim=True)
    sound = torch.isfinite(norms) & (norms > 0)
    unit = torch.where(sound, queries / norms, 0.0)
    rounded = unit.to(torch.bfloat16)
    error = corpus.error(torch.linalg.vector_norm(rounded.float() - unit, dim=1))
    maxima = _score(rounded, corpus, hidden, buffer)
    least = _lowest(maxima, error)
    threshold = torch.topk(least, min(k, least.shape[1]), dim=1).values[:, -1:]
    if floor is not None:
        # Scaled as the scores are; the slack covers the rounding of doing so.
        scaled = floor[:, None] / (norms * corpus.scale)
        threshold = torch.maximum(threshold, scaled - 1e-5 * scaled.abs())
    chosen = (_highest(maxima, error) >= threshold) & (maxima > -torch.inf)
    wide = chosen.sum(1) > _most_groups(k)
    undecided = wide | ~sound.squeeze(1)
    chosen &= ~undecided[:, None]
    pairs = _rescored(queries, corpus, chosen, threshold, error, buffer)
    return _best_pairs(pairs, len(queries), k), undecided.nonzero().squeeze(1)


def _lowest(coarse: Tensor, error: Tensor) -> Tensor:
    """What the true score is at least; 2^-8 of the coarse one is its own rounding."""
    return coarse - error - (1.01 * _UNIT) * coarse.abs()


def _highest(coarse: Tensor, error: Tensor) -> Tensor:
    """What the true score is at most."""
    return coarse + error + (1.01 * _UNIT) * coarse.abs()


def _score(
    unit: Tensor, corpus: CoarseCorpus, hidden: tuple[Tensor, Tensor] | None, buffer: Tensor
) -> Tensor:
    """Fill ``buffer`` with coarse scores, -inf for what is hidden; group maxima float32 [R, G]."""
    num_rows, num_columns = len(unit), len(corpus.vectors)
    maxima = unit.new_empty((num_rows, len(corpus.group_norm)))
    starts = range(0, len(corpus.group_norm) * _FOLD, _BLOCK)
    bounds = [0] * (len(starts) + 1)
    if hidden is not None:
        columns, order = hidden[1].sort()
        rows = hidden[0][order]
        edges = torch.tensor([*starts, num_columns], device=columns.device)
        bounds = torch.searchsorted(columns, edges).tolist()
    for number, (start, block) in enumerate(zip(starts, corpus.blocks, strict=True)):
        width = block.shape[1]
        out = buffer[num_rows * start : num_rows * (start + width)].view(num_rows, width)
        torch.mm(unit, block, out=out)
        out[:, max(num_columns - start, 0) :] = -torch.inf
        low, high = bounds[number], bounds[number + 1]
        if low < high:
            flat = rows[low:high] * width + (columns[low:high] - start)
            out.view(-1).index_fill_(0, flat, -torch.inf)
        groups = width // _FOLD
        first = start // _FOLD
        folded = out.view(num_rows, _FOLD, groups)
        torch.amax(folded, 1, out=maxima[:, first : first + groups])
    return maxima.float()


def _rescored(
    queries: Tensor,
    corpus: CoarseCorpus,
    chosen: Tensor,
    threshold: Tensor,
    error: Tensor,
    buffer: Tensor,
) -> Pairs:
    """Pairs of the chosen groups [R, G] that the threshold leaves, in float32."""
    rows, groups = chosen.nonzero().unbind(1)
    number = groups * _FOLD // _BLOCK
    start = number * _BLOCK
    last = len(corpus.blocks) - 1
    width = torch.where(number < last, _BLOCK, corpus.blocks[-1].shape[1])
    stride = width // _FOLD
    column = (groups - start // _FOLD)[:, None] + stride[:, None] * torch.arange(
        _FOLD, device=groups.device
    )
    flat = (start * len(queries) + rows * width)[:, None] + column
    coarse = buffer.index_select(0, flat.view(-1)).view(flat.shape)
    highest = _highest(coarse.float(), error[groups][:, None])
    least = threshold.squeeze(1)[rows][:, None]
    pair, place = ((highest >= least) & (coarse > -torch.inf)).nonzero().unbind(1)
    rows, columns = rows[pair], start[pair] + column[pair, place]
    scores = (queries.index_select(0, rows) * corpus.vectors.index_select(0, columns)).sum(1)
    return Pairs(rows, columns, scores)


def _best_pairs(pairs: Pairs, num_rows: int, k: int) -> TopK:
    """The K best of each row, ties by column; -inf / -1 where there are fewer."""
    counts = torch.bincount(pairs.rows, minlength=num_rows)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(pairs.rows), device=counts.device) - first[pairs.rows]
    longest = max(int(counts.max()) if num_rows else 0, k)
    keys = torch.full((num_rows, longest), _NOTHING, dtype=torch.int64, device=counts.device)
    keys[pairs.rows, place] = _keys(pairs)
    best = torch.topk(keys, k, dim=1).values
    columns = torch.where(best > _NOTHING, _LOW - (best & _LOW), -1)
    bits = (best >> 32).to(torch.int32)
    scores = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
    return TopK(columns, torch.where(columns >= 0, scores, -torch.inf))


def _keys(pairs: Pairs) -> Tensor:
    """int64 that rise with the score, and among equal scores fall with the column."""
    bits = (pairs.scores + 0.0).view(torch.int32)  # -0 becomes 0, its equal
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return (rising << 32) | (_LOW - pairs.columns)
