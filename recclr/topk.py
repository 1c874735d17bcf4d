"""Exact top-k over the whole corpus, tiled so that memory does not grow with Q × V.

Shape letters: Q queries, V corpus, C candidates ranked, D dimension, K cut-off, R rows of a tile.

Three scans give the same result. On a CPU ``CompiledScan`` scores every pair in float32 and keeps
the best while scores are in cache. Where the compiled kernels are missing, and on a GPU,
``Float32Scan`` does so in PyTorch, or ``BFloat16Scan`` finds in bfloat16 the few pairs worth a
float32 score (``coarse``), in half the time where the processor multiplies bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recclr.coarse import CoarseCorpus, coarse_top_k, smallest_corpus, supports_bfloat16
from recclr.compiled_scan import CompiledScan
from recclr.data.log import Csr
from recclr.errors import ShapeError
from recclr.kernels import native
from recclr.ranking import TopK
from recclr.selection import Fold, merge, select

# Rows × columns of one score tile, which bounds memory (64 MiB on a CPU).
_TILE_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
_MAX_ROWS = {"cpu": 256, "cuda": 1 << 16}
_MAX_COLUMNS = 1 << 16
# The compiled kernels count items in 32 bits.
_MOST_COMPILED = 1 << 31
# Elements of the corpus (which may be mapped from a file) that are copied at a time: 1 GiB.
_HELD_ELEMENTS = {"cpu": 1 << 28, "cuda": 1 << 32}

# (row, column) of what was seen, both int64, rows counted within a tile.
SeenPairs = tuple[Tensor, Tensor]


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
        corpus: float [V, D], row = item index, on the same device; may be mapped from a file that
            exceeds the memory, of which a stretch is read at a time.
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
    positions = None if items is None else _positions(items, len(corpus))
    num_candidates = len(corpus) if items is None else len(items)
    stretches = _stretches(num_candidates, corpus)
    best: TopK | None = None
    for number, (low, high) in enumerate(stretches):
        part = corpus[low:high] if items is None else corpus[items[low:high]]
        scan = _scan(queries, part, k)
        parts = []
        for start in range(0, len(queries), scan.rows):
            stop = min(start + scan.rows, len(queries))
            pairs = _pairs(seen, start, stop, positions)
            # What does not reach the K-th score of the stretches before need not be found.
            floor = None if best is None else best.scores[start:stop, -1]
            here = _inside(pairs, low, high - low, num_candidates)
            parts.append(scan(queries[start:stop], here, floor))
            if progress is not None:
                progress((number * len(queries) + stop) // len(stretches), len(queries))
        found = _join(parts, k, None, queries.device).shifted(low)
        best = found if best is None else merge([best, found], k)
    assert best is not None
    return _join([best], k, items, queries.device)


def _stretches(num_candidates: int, corpus: Tensor) -> list[tuple[int, int]]:
    """Bounds of the stretches of the corpus that are held in memory, and rearranged, at a time."""
    size = max(_HELD_ELEMENTS[corpus.device.type] // max(corpus.shape[1], 1), 1)
    starts = range(0, max(num_candidates, 1), size)
    return [(start, min(start + size, num_candidates)) for start in starts]


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
    return _join([select(scores.float(), k)], k, items, scores.device)


class EmbeddingRanker:
    """Ranks by dot product of stored vectors: a trained model, or any factorisation.

    Args:
        name: shown in reports.
        user_vectors: float32 [num_users + 1, D]; the last row serves every unknown user.
        item_vectors: float32 [V, D].
        similarity: of the items to each other, see ``similarity``.
        num_beside: of the D coordinates, how many at the end are not the item's own.
    """

    def __init__(
        self,
        name: str,
        user_vectors: Tensor,
        item_vectors: Tensor,
        *,
        similarity: str = "cosine",
        num_beside: int = 0,
    ) -> None:
        if user_vectors.ndim != 2 or user_vectors.shape[1] != item_vectors.shape[-1]:
            raise ShapeError(
                f"user and item vectors must share one dimension, found "
                f"{tuple(user_vectors.shape)} and {tuple(item_vectors.shape)}"
            )
        self.name = name
        self.user_vectors = user_vectors
        self.item_vectors = item_vectors
        self.similarity, self.num_beside = similarity, num_beside

    def top_k(
        self, user_idx: Tensor, k: int, *, seen: Csr | None = None, items: Tensor | None = None
    ) -> TopK:
        """See ``ranking.Ranker``; arguments from anywhere, the result where the vectors are."""
        device = self.user_vectors.device
        known = user_idx.to(device).clamp(max=len(self.user_vectors) - 1)
        seen = None if seen is None else seen.to(device)
        items = None if items is None else items.to(device)
        return top_k(self.user_vectors[known], self.item_vectors, k, seen=seen, items=items)

    def to(self, device: torch.device | str) -> EmbeddingRanker:
        """The same with its vectors on a device; shares them where they are there already."""
        return EmbeddingRanker(
            self.name,
            self.user_vectors.to(device),
            self.item_vectors.to(device),
            similarity=self.similarity,
            num_beside=self.num_beside,
        )

    def own_vectors(self) -> tuple[Tensor, Tensor]:
        """What the towers came to, without what the score needs beside: users and items, views of
        the vectors, or under ``euclidean`` with users copied.
        """
        stop = self.item_vectors.shape[1] - self.num_beside
        users, items = self.user_vectors[:, :stop], self.item_vectors[:, :stop]
        return (users / 2 if self.similarity == "euclidean" else users), items


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


def _pairs(seen: Csr | None, start: int, stop: int, positions: Tensor | None) -> SeenPairs | None:
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


def _scan(queries: Tensor, corpus: Tensor, k: int) -> CompiledScan | Float32Scan | BFloat16Scan:
    kernels = native.usable(queries, corpus)
    if kernels is not None and 0 < len(corpus) < _MOST_COMPILED:
        return CompiledScan(corpus, k, kernels)
    columns = _even_columns(len(corpus))
    # Decided by the corpus alone: one query gets the path that all of them get.
    if supports_bfloat16(queries.device) and columns >= smallest_corpus(k):
        chunks = [CoarseCorpus.build(chunk) for chunk in torch.split(corpus.float(), columns)]
        sound = [chunk for chunk in chunks if chunk is not None]
        if len(sound) == len(chunks):
            return BFloat16Scan(sound, corpus, k)
    return Float32Scan(corpus, k)


def _even_columns(num_columns: int) -> int:
    """Columns of a chunk, so that chunks are equal and none is wider than ``_MAX_COLUMNS``."""
    chunks = max(-(-num_columns // _MAX_COLUMNS), 1)
    return max(-(-num_columns // chunks), 1)


class Float32Scan:
    """Top-k of a tile of queries from float32 scores of all pairs.

    Attributes:
        rows: most queries per call.
    """

    def __init__(self, corpus: Tensor, k: int) -> None:
        self.k, self.transposed = k, corpus.T.contiguous()
        self.columns = _even_columns(len(corpus))
        kind = corpus.device.type
        self.rows = min(max(1, _TILE_ELEMENTS[kind] // self.columns), _MAX_ROWS[kind])
        self.buffer = corpus.new_empty(self.rows * self.columns)

    def __call__(
        self, queries: Tensor, seen: SeenPairs | None, floor: Tensor | None = None
    ) -> TopK:
        """At most ``rows`` queries; merged over chunks when the corpus is wider than a tile."""
        best: list[TopK] = []
        width = self.transposed.shape[1]
        for start in range(0, max(width, 1), self.columns):
            part = self.transposed[:, start : start + self.columns]
            here = _inside(seen, start, part.shape[1], width)
            best.append(self._chunk(queries, part, here).shifted(start))
        return best[0] if len(best) == 1 else merge(best, self.k)

    def _chunk(self, queries: Tensor, transposed: Tensor, seen: SeenPairs | None) -> TopK:
        """Scores block by block, -inf for what was seen, folded while they are in cache."""
        num_rows, num_columns = len(queries), transposed.shape[1]
        scores = self.buffer[: num_rows * num_columns].view(num_rows, num_columns)
        fold = Fold(num_columns, scores.device)
        maxima = scores.new_empty((num_rows, fold.num_groups))
        bounds, flat = [0] * (len(fold.starts) + 1), None
        if seen is not None:
            columns, order = seen[1].sort()
            flat = seen[0][order] * num_columns + columns
            edges = torch.tensor([*fold.starts, num_columns], device=columns.device)
            bounds = torch.searchsorted(columns, edges).tolist()
        for number, start in enumerate(fold.starts):
            block = scores[:, start : start + fold.block]
            torch.mm(queries, transposed[:, start : start + fold.block], out=block)
            if flat is not None and bounds[number] < bounds[number + 1]:
                hidden = flat[bounds[number] : bounds[number + 1]]
                scores.view(-1).index_fill_(0, hidden, -torch.inf)
            fold.block_maxima(block, number, maxima)
        return select(scores.float(), self.k, fold, maxima.float())


class BFloat16Scan:
    """As ``Float32Scan``, by way of coarse scores; float32 alone for queries that they leave open.

    Args:
        chunks: of the corpus, in its order.
    """

    def __init__(self, chunks: list[CoarseCorpus], corpus: Tensor, k: int) -> None:
        self.chunks, self.corpus, self.k = chunks, corpus, k
        self.rows = min(
            max(1, _TILE_ELEMENTS["cpu"] // len(chunks[0].vectors)), 2 * _MAX_ROWS["cpu"]
        )
        self.buffer = chunks[0].buffer(self.rows)
        self.float32: Float32Scan | None = None

    def __call__(
        self, queries: Tensor, seen: SeenPairs | None, floor: Tensor | None = None
    ) -> TopK:
        """At most ``rows`` queries; results below their ``floor`` [R] may be left out."""
        open_rows = torch.zeros(len(queries), dtype=torch.bool)
        best: TopK | None = None
        start = 0
        for chunk in self.chunks:
            here = _inside(seen, start, len(chunk.vectors), len(self.corpus))
            if best is not None:
                found_before = best.scores[:, -1]
                floor = found_before if floor is None else torch.maximum(floor, found_before)
            found, undecided = coarse_top_k(
                queries.float(), chunk, self.k, self.buffer, hidden=here, floor=floor
            )
            open_rows[undecided] = True
            found = found.shifted(start)
            best = found if best is None else merge([best, found], self.k)
            start += len(chunk.vectors)
        assert best is not None
        return self._completed(best, queries, seen, open_rows.nonzero().squeeze(1))

    def _completed(self, best: TopK, queries: Tensor, seen: SeenPairs | None, rows: Tensor) -> TopK:
        """The rows left open, ranked in float32, in their places."""
        if not len(rows):
            return best
        if self.float32 is None:
            self.float32 = Float32Scan(self.corpus, self.k)
        place = torch.full((len(queries),), -1)
        place[rows] = torch.arange(len(rows))
        for part in torch.split(rows, self.float32.rows):
            low = int(place[part[0]])
            here = None
            if seen is not None:
                inside = (place[seen[0]] >= low) & (place[seen[0]] < low + len(part))
                here = place[seen[0][inside]] - low, seen[1][inside]
            found = self.float32(queries[part], here)
            best.item_idx[part], best.scores[part] = found.item_idx, found.scores
        return best


def _inside(seen: SeenPairs | None, start: int, width: int, whole: int) -> SeenPairs | None:
    """Pairs within a chunk of columns, counted from its start."""
    if seen is None or width == whole:
        return seen
    inside = (seen[1] >= start) & (seen[1] < start + width)
    return seen[0][inside], seen[1][inside] - start


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
