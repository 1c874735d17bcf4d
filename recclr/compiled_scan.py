"""Top-k of queries from float32 scores of all pairs by the compiled kernels (``kernels.native``).

Shape letters: V corpus, D dimension, K cut-off, R queries of a call.

Scores are made 96 × 512 at a time, and of each query the K best so far are kept beside newcomers
that exceed the K-th: a third of the time of PyTorch's way with bfloat16 scores, and exact without a
second look. Memory: the corpus once more, and 16·K bytes for each of 96 queries and thread.
"""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from recclr.errors import DivergedError
from recclr.kernels.native import floats, longs, threads_for
from recclr.ranking import TopK

# Queries between two signs of progress.
_ROWS = 4096


class CompiledScan:
    """Ranks queries against one corpus.

    Args:
        corpus: float [V, D] on the CPU, V at least 1. k: at least 1.

    Attributes:
        rows: most queries per call.
    """

    rows = _ROWS

    def __init__(self, corpus: Tensor, k: int, kernels: CDLL) -> None:
        self.kernels, self.kept = kernels, min(k, len(corpus))
        self.columns, self.dim = corpus.shape
        self.threads = torch.get_num_threads()
        corpus = corpus.float().contiguous()
        sizes = self.columns, self.dim
        room = kernels.recclr_top_k_room(*sizes, self.kept, self.threads)
        self.buffer = corpus.new_empty(room)
        threads = threads_for(corpus.numel())
        kernels.recclr_top_k_pack(*sizes, *floats(corpus), threads, *floats(self.buffer))

    def __call__(
        self,
        queries: Tensor,
        seen: tuple[Tensor, Tensor] | None,
        floor: Tensor | None = None,
    ) -> TopK:
        """Best first, of equal scores the earlier item; -1 / -inf where the corpus ran out.

        Args:
            queries: float [R, D]. seen: (row, column) to leave out, int64 each, or None.
            floor: what other scans leave out results below of; nothing is gained by it here.

        Raises:
            DivergedError: a score is NaN, be it of something that was seen.
        """
        queries = queries.float().contiguous()
        scores = queries.new_empty((len(queries), self.kept))
        items = queries.new_empty(scores.shape, dtype=torch.int64)
        offsets, columns = (None, None) if seen is None else self._lists(seen, len(queries))
        odd = self.kernels.recclr_top_k(
            len(queries),
            self.columns,
            self.dim,
            self.kept,
            *floats(queries),
            *longs(offsets, columns),
            min(self.threads, threads_for(queries.numel() * self.columns)),
            *floats(self.buffer, scores),
            *longs(items),
        )
        if odd:
            raise DivergedError("a ranker produced NaN scores; nothing can be ranked by them")
        return TopK(items, scores)

    def _lists(self, seen: tuple[Tensor, Tensor], num_rows: int) -> tuple[Tensor, Tensor]:
        """Columns of each row, rising, and where those of each row begin, [R + 1]."""
        # An item that is none of the corpus would count as one of the next query.
        inside = (seen[1] >= 0) & (seen[1] < self.columns)
        if not bool(inside.all()):
            seen = seen[0][inside], seen[1][inside]
        keys = seen[0] * self.columns + seen[1]
        if bool((keys.diff() < 0).any()):
            keys = keys.sort().values
        edges = torch.arange(num_rows + 1, device=keys.device) * self.columns
        return torch.searchsorted(keys, edges), keys % self.columns
