"""What the vectors of both towers look like, as they would be served but for what the score needs
beside them: figures that tell a model that uses its space from one that has collapsed.

Shape letters: N vectors, D dimension, P pairs, U users, V items, Q queries, K cut-off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from recclr.correlation import pearson, points_of
from recclr.data.log import Csr, EncodedLog
from recclr.errors import ShapeError
from recclr.kernels import unit_rows
from recclr.order import permuted
from recclr.topk import EmbeddingRanker

# Sizes of the samples, which bound the cost whatever the log: pairs of vectors that are compared
# grow with the square of the first, and the others cost a product with all items or with D vectors.
_VECTORS, _PAIRS, _QUERIES, _ROWS = 1_024, 8_192, 512, 65_536
_CHUNK = 8_192
_KEY = 0x3011
# Norms that differ by less are equal but for rounding, as all are under cosine similarity.
_EQUAL = 1e-4

DEFINITIONS: Mapping[str, str] = {
    "alignment": "mean squared distance between the unit vectors of user and item over held-out "
    "pairs, 0 to 4; lower is closer (Wang & Isola 2020)",
    "alignment_train": "the same over train pairs",
    "uniformity": "log of the mean of exp(-2 d²) over pairs of unit vectors at distance d, -8 to 0;"
    " 0 where all are one (Wang & Isola 2020)",
    "variance": "mean squared distance of unit vectors from their mean, 0 to 1; 0 where all are "
    "one",
    "effective rank": "exp of the entropy of the singular values divided by their sum; at most the "
    "dimension (Roy & Vetterli 2007)",
    "first direction": "share of the squared singular values that the largest has",
    "top item": "share of all recommended slots that the most recommended item takes; at most 1/k",
    "top 1 %": "share of all slots that the 1 % most recommended items take, or k items if that is "
    "more",
    "demand": "share of held-out rows (of train rows without any) that as many most taken items "
    "have",
    "distinct items": "items that are recommended to anybody of the sample",
    "overlap": "share of their top k that two users have in common, on average",
    "norm and popularity": "correlation of an item's vector length with the log of its train count",
}
"""What the figures of ``Monitor`` mean; those of one side bear ``user_`` or ``item_``."""


def alignment(queries_PD: Tensor, items_PD: Tensor) -> float:
    """Mean squared distance of the unit vectors of pairs, 0 to 4 (Wang & Isola 2020, alpha = 2).

    Args:
        queries_PD, items_PD: float [P, D], P at least 1; row by row a pair. A zero vector stays
            zero.
    """
    difference = unit_rows(queries_PD) - unit_rows(items_PD)
    return float(difference.double().square().sum(1).mean())


def uniformity(vectors_ND: Tensor) -> float:
    """Log of the mean of exp(-2 d²) over all pairs of unit vectors, -8 to 0.

    Wang & Isola 2020, with t = 2.

    Args:
        vectors_ND: float [N, D]; memory grows with N².

    Raises:
        ShapeError: fewer than two vectors.
    """
    num = len(vectors_ND)
    if num < 2:
        raise ShapeError(f"uniformity is of pairs: expected at least 2 vectors, found {num}")
    unit = unit_rows(vectors_ND)
    lengths = unit.square().sum(1)
    squared = lengths[:, None] + lengths[None] - 2 * (unit @ unit.T)
    near = squared.clamp_(min=0).mul_(-2).exp_()
    near.fill_diagonal_(0)
    return math.log(float(near.sum(dtype=torch.float64)) / (num * (num - 1)))


def variance(vectors_ND: Tensor) -> float:
    """Mean squared distance of unit vectors from their mean, 0 to 1; N at least 1."""
    unit = unit_rows(vectors_ND)
    mean = unit.mean(0, dtype=torch.float64)
    # Lengths are 1 but for zero vectors; what is left of a float32 error is below 1e-6.
    squared = torch.linalg.vecdot(unit, unit).mean(dtype=torch.float64) - mean.dot(mean)
    return max(float(squared), 0.0)


def singular_values(vectors_ND: Tensor) -> Tensor:
    """Singular values of the matrix, falling: float64 [min(N, D)].

    By way of the D × D products of columns in float64, which cost N·D² and keep what exceeds 1e-8
    of the largest.
    """
    num, dim = vectors_ND.shape
    products = torch.zeros((dim, dim), dtype=torch.float64, device=vectors_ND.device)
    for part in torch.split(vectors_ND, _CHUNK):
        double = part.double()
        products.addmm_(double.T, double)
    values: Tensor = torch.linalg.eigvalsh(products).clamp_(min=0).sqrt_().flip(0)
    return values[: min(num, dim)]


def effective_rank(values: Tensor) -> float:
    """How many directions count: exp of the entropy of singular values divided by their sum.

    Roy & Vetterli 2007, definition 1.

    Args:
        values: float [R], not negative. All zero, or none, gives 0.
    """
    total = float(values.sum())
    if total == 0.0:
        return 0.0
    share = values / total
    return math.exp(float(torch.special.entr(share).sum()))


def first_share(values: Tensor) -> float:
    """Share of the squared singular values that the largest has; 0 where all are zero."""
    squared = values.square()
    return float(squared.max() / squared.sum()) if bool((squared > 0).any()) else 0.0


def quartiles(values: Tensor) -> list[float]:
    """The three quartiles of float [N], N at least 1."""
    return points_of(values, (0.25, 0.5, 0.75))


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's correlation of float [N]; None where one of them hardly varies."""
    a, b = a.double(), b.double()
    for x in (a, b):
        if len(x) < 2 or float(x.std()) <= _EQUAL * float(x.abs().mean()):
            return None
    return pearson(a, b)


def concentration(item_idx_QK: Tensor, num_items: int) -> dict[str, float]:
    """How the slots of rankings are spread over items.

    Args:
        item_idx_QK: int64 [Q, K]; each row's items are distinct, -1 is an empty slot. At least one
            slot is filled.
        num_items: size of the corpus.

    Returns:
        ``top_item_share``, ``top_percent_share``, ``top_items`` (how many these are),
        ``distinct_items`` and, of two queries or more, ``overlap``; see ``DEFINITIONS``.
    """
    num_queries, k = item_idx_QK.shape
    counts = torch.bincount(item_idx_QK[item_idx_QK >= 0], minlength=num_items)
    counts = counts.sort(descending=True).values.double()
    slots, top_items = float(counts.sum()), most_taken(num_items, k)
    found = {
        "top_item_share": float(counts[0]) / slots,
        "top_percent_share": float(counts[:top_items].sum()) / slots,
        "top_items": float(top_items),
        "distinct_items": float((counts > 0).sum()),
    }
    if num_queries > 1:
        # Every pair of users of an item has it in common.
        pairs = float((counts * (counts - 1)).sum()) / (num_queries * (num_queries - 1))
        found["overlap"] = pairs / (slots / num_queries)
    return found


def most_taken(num_items: int, k: int) -> int:
    """How many items ``top_percent_share`` is of: 1 % of them, at least what one user is shown."""
    return min(num_items, max(math.ceil(num_items / 100), k))


class Monitor:
    """Figures of a model on samples that are drawn once, by the seed.

    Vectors are looked at of users and items with train rows: the others share what stands for the
    unknown. Uniformity and alignment are of at most 1,024 vectors and 8,192 pairs, singular values
    of at most 65,536 vectors, rankings of at most 512 users.

    Args:
        train: what the model learns from.
        k: items that a user is shown.
        users: int64 [Q], of whom rankings are sampled; None: of all users with train rows.
        seen: Q rows of items left out of these rankings, or None.
        held_out: (user_idx, item_idx), int64 [P] each: pairs to be near each other; None for none.
    """

    def __init__(
        self,
        train: EncodedLog,
        *,
        k: int,
        seed: int,
        users: Tensor | None = None,
        seen: Csr | None = None,
        held_out: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.k, self.seed = k, seed
        counts = train.item_counts().cpu()
        self.warm = {
            "user": (train.user_counts().cpu() > 0).nonzero().squeeze(1),
            "item": (counts > 0).nonzero().squeeze(1),
        }
        self.log_counts = counts[self.warm["item"]].double().log()
        queries = self.warm["user"] if users is None else users
        rows = self._sample(len(queries), _QUERIES, 1)
        self.queries, self.seen = queries[rows], None if seen is None else seen.take(rows)
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        if held_out is not None and len(held_out[0]):
            self.pairs["alignment"] = self._pairs(*held_out, key=2)
            counts = torch.bincount(held_out[1], minlength=len(counts))
        if len(train):
            rows = self._sample(len(train), _PAIRS, 3).to(train.item_idx.device)
            some = train.rows(rows)
            self.pairs["alignment_train"] = some.user_idx.cpu().long(), some.item_idx.cpu().long()
        most = most_taken(len(counts), k)
        self.demand = float(counts.sort(descending=True).values[:most].sum() / counts.sum())

    def __call__(self, ranker: EmbeddingRanker) -> dict[str, float]:
        """The figures by name, all finite; what is not defined is left out.

        Args:
            ranker: of U users and V items, on the CPU. Rankings are what it serves; the other
                figures are of its own vectors, since coordinates of a lift or of a bias would
                drown the angles between them.
        """
        found: dict[str, float] = {}
        users, items = ranker.own_vectors()
        for name, (user_idx, item_idx) in self.pairs.items():
            queries = users[user_idx.clamp(max=len(users) - 1)]
            found[name] = alignment(queries, items[item_idx])
        for number, (side, vectors) in enumerate((("user", users), ("item", items))):
            found |= self._of_side(side, vectors, 4 + number)
        found |= self._of_rankings(ranker)
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _of_side(self, side: str, vectors: Tensor, key: int) -> dict[str, float]:
        warm = self.warm[side]
        own = vectors if len(warm) == len(vectors) else vectors[warm]
        found: dict[str, float] = {}
        if not len(own) or not bool(torch.isfinite(own).all()):
            return found
        if len(own) > 1:
            few = own[self._sample(len(own), _VECTORS, key)]
            found["uniformity"] = uniformity(few)
        many = own if len(own) <= _ROWS else own[self._sample(len(own), _ROWS, key)]
        values = singular_values(many)
        found |= {
            "variance": variance(many),
            "rank": effective_rank(values),
            "rank_limit": float(len(values)),
            "first_share": first_share(values),
        }
        lengths = torch.linalg.vector_norm(own, dim=1)
        for name, length in zip(("q1", "median", "q3"), quartiles(lengths), strict=True):
            found[f"norm_{name}"] = length
        named = {f"{side}_{name}": value for name, value in found.items()}
        if side == "item":
            related = correlation(lengths, self.log_counts)
            named |= {} if related is None else {"norm_popularity": related}
        return named

    def _of_rankings(self, ranker: EmbeddingRanker) -> dict[str, float]:
        if not len(self.queries):
            return {}
        found = ranker.top_k(self.queries, self.k, seen=self.seen).item_idx
        if not bool((found >= 0).any()):
            return {}
        return concentration(found, len(ranker.item_vectors)) | {
            "demand_share": self.demand,
            "num_queries": float(len(self.queries)),
        }

    def _pairs(self, user_idx: Tensor, item_idx: Tensor, *, key: int) -> tuple[Tensor, Tensor]:
        rows = self._sample(len(user_idx), _PAIRS, key)
        return user_idx[rows], item_idx[rows]

    def _sample(self, size: int, most: int, key: int) -> Tensor:
        """Rising rows of a sample without repeats; all rows where they are no more than ``most``.

        By a keyed permutation, so that it costs what it holds, and not what it is of.
        """
        if size <= most:
            return torch.arange(size)
        return permuted(torch.arange(most), size, self.seed, _KEY, key).sort().values
