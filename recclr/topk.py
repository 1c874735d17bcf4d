"""Exact top-k over the whole corpus, tiled so that memory does not grow with Q × V.

Shape letters: Q queries, V corpus, C candidates ranked, D dimension, K cut-off, R rows of a tile,
G groups of a tile.

Selection is the cost once the GEMM runs from cache. A tile's columns are folded into G groups of
``_FOLD``; the K + 1 largest elements of a row lie in the K + 1 groups with the largest maxima, so
only those groups are looked at again (one streaming maximum instead of a heap over V). Scores are
computed a block of columns at a time and folded while the block is still in cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recclr.data.log import Csr
from recclr.errors import DivergedError, ShapeError
from recclr.ranking import TopK

_FOLD = 32
# Rows × columns of one score tile, which bounds memory (64 MiB on a CPU).
_TILE_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
_MAX_ROWS = {"cpu": 256, "cuda": 1 << 16}
_MAX_COLUMNS = 1 << 16
# Columns scored and folded together; 256 × 2,048 scores fit the second-level cache of two cores
# (measured: 1.6 s for Gowalla against 2.4 s with whole rows). A GPU wants launches to be few.
_BLOCK = {"cpu": 2048, "cuda": 1 << 16}


def top_k(
    queries: Tensor,
    corpus: Tensor,
    k: int,
    *,
    seen: Csr | None = None,
    items: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TopK:
    """The ``k`` items of largest dot product with each query, exactly.

    Args:
        queries: float [Q, D]. Q may be 0.
        corpus: float [V, D], row = item index, on the same device.
        k: at least 1; may exceed the number of candidates.
        seen: Q rows of item indices to leave out, or None.
        items: int64 [C], strictly rising: rank only these. None ranks all V.
        progress: called with (queries done, Q) after each tile.

    Returns:
        int64 / float32 [Q, K], best first, ties by item index; -1 / -inf where candidates ran out.

    Raises:
        ShapeError: shapes do not fit. DivergedError: a score is NaN.
    """
    _check(queries, corpus, k, seen)
    positions = None
    if items is not None:
        positions = _positions(items, len(corpus))
        corpus = corpus[items]
    num_queries, num_candidates = len(queries), len(corpus)
    columns = min(max(num_candidates, 1), _MAX_COLUMNS)
    kind = queries.device.type
    rows = min(max(1, _TILE_ELEMENTS[kind] // columns), _MAX_ROWS[kind])
    transposed = corpus.T.contiguous()
    buffer = queries.new_empty(rows * columns)
    parts = []
    for start in range(0, num_queries, rows):
        stop = min(start + rows, num_queries)
        tile_seen = _pairs(seen, start, stop, positions)
        parts.append(_tile(queries[start:stop], transposed, k, columns, tile_seen, buffer))
        if progress is not None:
            progress(stop, num_queries)
    return _join(parts, k, items, queries.device)


def top_k_of_scores(
    scores: Tensor, k: int, *, seen: Csr | None = None, items: Tensor | None = None
) -> TopK:
    """As ``top_k``, from scores that are already there.

    Args:
        scores: float32 [Q, V]; -inf leaves an item out. Not changed.
    """
    if scores.ndim != 2 or k < 1 or (seen is not None and seen.num_rows != len(scores)):
        raise ShapeError(
            f"top_k_of_scores needs scores [Q, V], k >= 1 and Q rows of seen items; found "
            f"{tuple(scores.shape)}, k = {k}, {seen.num_rows if seen else 'no'} rows"
        )
    positions = None
    if items is not None:
        positions = _positions(items, scores.shape[1])
        scores = scores[:, items]
    elif seen is not None:
        scores = scores.clone()
    pairs = _pairs(seen, 0, len(scores), positions)
    if pairs is not None:
        scores[pairs] = -torch.inf
    return _join([_select(scores.float(), k)], k, items, scores.device)


class EmbeddingRanker:
    """Ranks by dot product of stored vectors: a trained model, or any factorisation.

    Args:
        name: shown in reports.
        user_vectors: float32 [num_users + 1, D]; the last row serves every unknown user.
        item_vectors: float32 [V, D].
    """

    def __init__(self, name: str, user_vectors: Tensor, item_vectors: Tensor) -> None:
        if user_vectors.ndim != 2 or user_vectors.shape[1] != item_vectors.shape[-1]:
            raise ShapeError(
                f"user and item vectors must share one dimension, found "
                f"{tuple(user_vectors.shape)} and {tuple(item_vectors.shape)}"
            )
        self.name = name
        self.user_vectors = user_vectors
        self.item_vectors = item_vectors

    def top_k(
        self, user_idx: Tensor, k: int, *, seen: Csr | None = None, items: Tensor | None = None
    ) -> TopK:
        """See ``ranking.Ranker``."""
        known = user_idx.to(self.user_vectors.device).clamp(max=len(self.user_vectors) - 1)
        return top_k(self.user_vectors[known], self.item_vectors, k, seen=seen, items=items)


def _check(queries: Tensor, corpus: Tensor, k: int, seen: Csr | None) -> None:
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[1] != corpus.shape[1]:
        raise ShapeError(
            f"expected queries [Q, D] and corpus [V, D], found {tuple(queries.shape)} and "
            f"{tuple(corpus.shape)}"
        )
    if k < 1:
        raise ShapeError(f"k must be at least 1, found {k}")
    if seen is not None and seen.num_rows != len(queries):
        raise ShapeError(f"expected {len(queries)} rows of seen items, found {seen.num_rows}")


def _positions(items: Tensor, num_items: int) -> Tensor:
    """Item index -> column among ``items``, -1 for the others."""
    positions = torch.full((num_items,), -1, dtype=torch.int64, device=items.device)
    positions[items] = torch.arange(len(items), device=items.device)
    return positions


def _pairs(
    seen: Csr | None, start: int, stop: int, positions: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """(row, column) of each seen item of queries ``start`` to ``stop``, rows counted from 0."""
    if seen is None:
        return None
    offsets = seen.offsets[start : stop + 1]
    columns = seen.values[int(offsets[0]) : int(offsets[-1])].long()
    rows = torch.arange(stop - start, device=offsets.device)
    rows = rows.repeat_interleave(offsets.diff(), output_size=len(columns))
    if positions is not None:
        columns = positions[columns]
        rows, columns = rows[columns >= 0], columns[columns >= 0]
    return rows, columns


def _tile(
    queries: Tensor,
    transposed: Tensor,
    k: int,
    columns: int,
    seen: tuple[Tensor, Tensor] | None,
    buffer: Tensor,
) -> TopK:
    """Top-k of a few queries, merged over column blocks when the corpus is wider than a tile."""
    best: list[TopK] = []
    for start in range(0, max(transposed.shape[1], 1), columns):
        part = transposed[:, start : start + columns]
        scores = buffer[: len(queries) * part.shape[1]].view(len(queries), part.shape[1])
        here = seen
        if seen is not None and part.shape[1] < transposed.shape[1]:
            inside = (seen[1] >= start) & (seen[1] < start + columns)
            here = seen[0][inside], seen[1][inside] - start
        maxima = _score(queries, part, here, scores)
        found = _select(scores.float(), k, maxima.float())
        best.append(TopK(found.item_idx + start * (found.item_idx >= 0), found.scores))
    return best[0] if len(best) == 1 else _merge(best, k)


def _score(
    queries: Tensor, transposed: Tensor, seen: tuple[Tensor, Tensor] | None, out: Tensor
) -> Tensor:
    """Fill ``out`` [R, C] with scores, -inf for what was seen; its group maxima [R, G]."""
    fold = _Fold(out.shape[1], out.device)
    maxima = out.new_empty((len(out), fold.num_groups))
    bounds = [0] * (len(fold.starts) + 1)
    if seen is not None:
        columns, order = seen[1].sort()
        flat = seen[0][order] * out.shape[1] + columns
        edges = torch.tensor([*fold.starts, out.shape[1]], device=columns.device)
        bounds = torch.searchsorted(columns, edges).tolist()
    for number, start in enumerate(fold.starts):
        block = out[:, start : start + fold.block]
        torch.mm(queries, transposed[:, start : start + fold.block], out=block)
        if bounds[number] < bounds[number + 1]:
            hidden = flat[bounds[number] : bounds[number + 1]]
            out.view(-1).index_fill_(0, hidden, -torch.inf)
        fold.block_maxima(block, number, maxima)
    return maxima


def _merge(parts: list[TopK], k: int) -> TopK:
    """Best ``k`` of several candidate lists; the item order of blocks settles ties."""
    scores = torch.cat([part.scores for part in parts], 1)
    item_idx = torch.cat([part.item_idx for part in parts], 1)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return TopK(item_idx.gather(1, order)[:, :k], scores[:, :k])


def _select(scores: Tensor, k: int, maxima: Tensor | None = None) -> TopK:
    """Exact top-k of each row of float32 [R, C], ties by column; -1 for -inf.

    Args:
        maxima: of the groups of ``_Fold``, where they are known already.
    """
    width = min(k, scores.shape[1])
    if width == 0:
        empty = scores.new_empty((len(scores), 0))
        return TopK(empty.long(), empty)
    values, columns = _largest(scores, min(k + 1, scores.shape[1]), maxima)
    if torch.isnan(values).any():
        raise DivergedError("a ranker produced NaN scores; nothing can be ranked by them")
    if values.shape[1] > width:
        # One look beyond the cut-off tells whether equal scores straddle it.
        tied = (values[:, width] == values[:, width - 1]) & (values[:, width] > -torch.inf)
        values, columns = values[:, :width], columns[:, :width]
        rows = tied.nonzero().squeeze(1)
        if len(rows):
            columns[rows] = _first_among_ties(scores[rows], values[rows, -1:], width)
            values[rows] = scores[rows].gather(1, columns[rows])
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    return TopK(torch.where(values > -torch.inf, columns, -1), values)


class _Fold:
    """How the columns of a row are folded into groups of ``_FOLD``, block by block.

    Column f·n + j of a block of n·_FOLD columns belongs to its group j; columns beyond the last
    whole group of the last block (fewer than ``_FOLD``) belong to none.
    """

    def __init__(self, num_columns: int, device: torch.device) -> None:
        self.block = _BLOCK[device.type]
        self.starts = list(range(0, max(num_columns, 1), self.block))
        self.per_block = self.block // _FOLD
        last = num_columns - self.starts[-1]
        self.last_groups = last // _FOLD
        self.num_groups = (len(self.starts) - 1) * self.per_block + self.last_groups
        self.tail = torch.arange(
            self.starts[-1] + self.last_groups * _FOLD, num_columns, device=device
        )

    def block_maxima(self, block: Tensor, number: int, out: Tensor) -> None:
        """Write the group maxima of one block of scores into its place in ``out`` [R, G]."""
        groups = self.per_block if number < len(self.starts) - 1 else self.last_groups
        if groups:
            first = number * self.per_block
            folded = block[:, : groups * _FOLD].view(len(block), _FOLD, groups)
            torch.amax(folded, 1, out=out[:, first : first + groups])

    def maxima(self, scores: Tensor) -> Tensor:
        """Group maxima of whole rows, [R, G]."""
        out = scores.new_empty((len(scores), self.num_groups))
        for number, start in enumerate(self.starts):
            self.block_maxima(scores[:, start : start + self.block], number, out)
        return out

    def columns(self, groups: Tensor) -> Tensor:
        """Columns of groups [R, M], then those of no group, int64 [R, M·_FOLD + tail]."""
        number = groups // self.per_block
        stride = torch.where(number < len(self.starts) - 1, self.per_block, self.last_groups)
        first = number * self.block + groups - number * self.per_block
        inside = torch.arange(_FOLD, device=groups.device) * stride[:, :, None]
        columns = (first[:, :, None] + inside).flatten(1)
        return torch.cat([columns, self.tail.expand(len(groups), -1)], 1)


def _largest(scores: Tensor, count: int, maxima: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values and columns of the ``count`` largest elements per row, in no order among ties."""
    fold = _Fold(scores.shape[1], scores.device)
    if fold.num_groups <= 2 * count:
        return torch.topk(scores, count, dim=1)
    if maxima is None:
        maxima = fold.maxima(scores)
    chosen = torch.topk(maxima, count, dim=1, sorted=False).indices
    candidates = fold.columns(chosen)
    values, order = torch.topk(scores.gather(1, candidates), count, dim=1)
    return values, candidates.gather(1, order)


def _first_among_ties(scores: Tensor, threshold: Tensor, width: int) -> Tensor:
    """Columns of all scores above the threshold, filled up with the first that equal it."""
    above = scores > threshold
    equal = scores == threshold
    room = width - above.sum(1, keepdim=True)
    kept = above | (equal & (equal.cumsum(1) <= room))
    return kept.nonzero()[:, 1].view(len(scores), width)


def _join(parts: list[TopK], k: int, items: Tensor | None, device: torch.device) -> TopK:
    """Stack tiles, translate columns to items, and pad to ``k`` columns."""
    if not parts:
        return TopK(
            torch.empty((0, k), dtype=torch.int64, device=device),
            torch.empty((0, k), device=device),
        )
    item_idx = torch.cat([part.item_idx for part in parts])
    scores = torch.cat([part.scores for part in parts])
    if items is not None and len(items):
        item_idx = torch.where(item_idx >= 0, items[item_idx.clamp(min=0)], -1)
    missing = k - item_idx.shape[1]
    if missing > 0:
        item_idx = torch.nn.functional.pad(item_idx, (0, missing), value=-1)
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    return TopK(item_idx, scores)
