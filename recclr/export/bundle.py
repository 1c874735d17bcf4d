"""What leaves the trainer: both towers' embeddings, their ids, and questions with known answers.

Shape letters: V items, U users, D dimension, G golden queries, K cut-off.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recclr.data.ids import canonical_ids
from recclr.data.vocabulary import Vocabulary
from recclr.errors import ConfigError, DataError, DivergedError, ShapeError
from recclr.similarity import LIFTED, as_candidates, as_queries
from recclr.topk import top_k

METRIC = "dot"
SIMILARITIES = tuple(LIFTED)
GOLDEN_QUERIES = 100
GOLDEN_K = 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_UNIT_TOLERANCE = 1e-3
_VERSION_DIGITS = 16


@dataclass(frozen=True)
class ModelFacts:
    """Where the embeddings come from.

    Attributes:
        created: time of the export, ISO 8601, UTC.
        config_sha256: digest of the complete configuration.
        train_cutoff: seconds UTC just after the last train event.
        recclr: version of the library that made them.
    """

    created: str
    config_sha256: str | None = None
    train_cutoff: int | None = None
    recclr: str | None = None


@dataclass(frozen=True, eq=False)
class GoldenQueries:
    """Users with their exact best items over the whole corpus, nothing left out.

    Attributes:
        user_ids: [G], spread over the vocabulary; the last one is null, an unknown user.
        item_ids: G lists of K raw ids, best first.
        scores: float32 [G, K].
    """

    user_ids: pl.Series
    item_ids: list[list[int | str]]
    scores: Tensor

    @property
    def k(self) -> int:
        """Items per query: 20, or the size of a smaller corpus."""
        return self.scores.shape[1]


@dataclass(frozen=True, eq=False)
class EmbeddingBundle:
    """Embeddings ready to be shipped; made by ``build_bundle``, which checks them.

    Served by dot product always, which every store has: under cosine the vectors have unit length,
    so it is the same; under Euclidean similarity they are lifted by two coordinates (``similarity``
    says how, and how to have the plain ones), so that it is minus the squared distance.

    Attributes:
        name: what the embeddings are called in a store.
        version: hash of similarity, ids and vectors, hex.
        similarity: what the scores are, "cosine", "dot" or "euclidean"; "dot" where a bias of items
            is one of the coordinates.
        item_ids: [V] raw ids in their own type. item_vectors: float32 [V, D].
        user_ids: [U]; may be empty. user_vectors: float32 [U, D].
        unknown_user_vector: float32 [D], for everyone else.
        golden: questions that a store must answer as the trainer does.
        facts: where they come from; no part of the version.
    """

    name: str
    version: str
    similarity: str
    item_ids: pl.Series
    item_vectors: Tensor
    user_ids: pl.Series
    user_vectors: Tensor
    unknown_user_vector: Tensor
    golden: GoldenQueries
    facts: ModelFacts

    @property
    def embedding_dim(self) -> int:
        return self.item_vectors.shape[1]

    @property
    def num_bytes(self) -> int:
        """Of ids and vectors in memory; a store needs about as much."""
        vectors = (len(self.item_ids) + len(self.user_ids)) * self.embedding_dim * 4
        return vectors + int(self.item_ids.estimated_size() + self.user_ids.estimated_size())


def build_bundle(
    *,
    item_ids: pl.Series,
    item_vectors: Tensor,
    user_ids: pl.Series,
    user_vectors: Tensor,
    unknown_user_vector: Tensor,
    similarity: str,
    facts: ModelFacts,
    name: str = "catalogue",
) -> EmbeddingBundle:
    """Check the embeddings, and answer the golden queries exactly.

    Args:
        item_ids, user_ids: integers or strings, distinct, none null.
        item_vectors, user_vectors, unknown_user_vector: floats [V, D], [U, D], [D] on any device;
            V is at least 1. A user's vector may be all zeros (nothing is known), an item's not.
        similarity: "cosine" demands unit length, "euclidean" lifted vectors.

    Raises:
        ConfigError: the name or the similarity. ShapeError: shapes do not fit.
        DataError: ids are null, repeated, or neither integers nor strings.
        DivergedError: a vector is not finite, not of unit length, not lifted, or an item's is zero.
    """
    require_name(name)
    if similarity not in SIMILARITIES:
        raise ConfigError(f"similarity: expected one of {SIMILARITIES}, found {similarity!r}")
    ids = {"item": _ids(item_ids, "item"), "user": _ids(user_ids, "user")}
    vectors = {
        "item": _on_cpu(item_vectors),
        "user": _on_cpu(user_vectors),
        "unknown user": _on_cpu(unknown_user_vector),
    }
    _check_shapes(ids, vectors)
    everyone = torch.cat([vectors["user"], vectors["unknown user"][None]])
    _check_vectors(vectors["item"], ids["item"], "item", similarity, zeros=False)
    # A null id, so that a message about the last row says that it is the unknown user's.
    _check_vectors(everyone, ids["user"].extend_constant(None, 1), "user", similarity, zeros=True)
    return EmbeddingBundle(
        name=name,
        version=content_version(similarity, ids, vectors),
        similarity=similarity,
        item_ids=ids["item"],
        item_vectors=vectors["item"],
        user_ids=ids["user"],
        user_vectors=vectors["user"],
        unknown_user_vector=vectors["unknown user"],
        golden=_golden(ids["user"], everyone, ids["item"], vectors["item"]),
        facts=facts,
    )


def require_name(name: str) -> None:
    """Refuse a name that is not a plain one; it becomes part of table names and paths.

    Raises:
        ConfigError: anything but letters, digits, '_', '.', '-', or more than 64 of them.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name {name!r}: expected at most 64 letters, digits, '_', '.' and '-', "
            "the first a letter or digit"
        )


def content_version(similarity: str, ids: dict[str, pl.Series], vectors: dict[str, Tensor]) -> str:
    """16 hex digits that depend on ids, their types and order, and every bit of the vectors."""
    digest = hashlib.sha256(f"{similarity};".encode())
    for side, values in ids.items():
        digest.update(f"{side} {values.dtype} {len(values)};".encode())
        if values.dtype == pl.String:
            # Lengths first: ["ab", "c"] is not ["a", "bc"].
            digest.update(values.str.len_bytes().to_numpy().astype("<u4").tobytes())
            digest.update("".join(values.to_list()).encode())
        else:
            digest.update(np.ascontiguousarray(values.to_numpy()).tobytes())
    for side, tensor in vectors.items():
        digest.update(f"{side} {tuple(tensor.shape)};".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()[:_VERSION_DIGITS]


def _ids(ids: pl.Series, side: str) -> pl.Series:
    where = f"the {side} ids to export"
    canonical = canonical_ids(ids, where=where).rename(f"{side}_id")
    if canonical.null_count():
        raise DataError(f"{where}: expected no nulls, found {canonical.null_count():,}")
    repeated = canonical.filter(canonical.is_duplicated())
    if len(repeated):
        raise DataError(
            f"{where}: expected distinct ids, found {repeated.n_unique():,} repeated, for example "
            f"{repeated[0]!r}; keep one row per {side}"
        )
    return canonical


def _on_cpu(vectors: Tensor) -> Tensor:
    return vectors.detach().to("cpu", torch.float32).contiguous()


def _check_shapes(ids: dict[str, pl.Series], vectors: dict[str, Tensor]) -> None:
    unknown = vectors["unknown user"]
    if unknown.ndim != 1 or not len(unknown):
        raise ShapeError(f"expected an unknown user vector [D], found {tuple(unknown.shape)}")
    for side, values in ids.items():
        expected, found = (len(values), len(unknown)), tuple(vectors[side].shape)
        if found != expected:
            raise ShapeError(
                f"{side} vectors: expected {expected} ({side} ids, dimension of the unknown "
                f"user), found {found}"
            )
    if not len(ids["item"]):
        raise ShapeError("there is no item to export; a store needs at least one")


def _check_vectors(
    vectors: Tensor, ids: pl.Series, side: str, similarity: str, *, zeros: bool
) -> None:
    norms = vectors.norm(dim=1)
    # The squares of a finite vector may be infinite, and with them its scores. Where no norm is,
    # no score is either: it is at most the product of two norms.
    _refuse(~norms.isfinite(), ids, side, "not finite: the training has diverged")
    if not zeros:
        _refuse(norms == 0, ids, side, "all zeros, which no query can tell apart")
    if similarity == "cosine":
        wrong = ((norms - 1).abs() > _UNIT_TOLERANCE) & (norms > 0)
        _refuse(wrong, ids, side, "not of unit length, which similarity 'cosine' promises")
    if similarity == "euclidean":
        wrong = _unlifted(vectors, side)
        _refuse(wrong, ids, side, "not lifted, as similarity 'euclidean' needs them to be")


def _unlifted(vectors: Tensor, side: str) -> Tensor:
    """Bool [n]: rows that ``similarity`` did not make of what it would have made them of."""
    own = vectors[:, : -LIFTED["euclidean"]]
    lifted = as_candidates(own, "euclidean") if side == "item" else as_queries(own / 2, "euclidean")
    if lifted.shape != vectors.shape:
        return torch.ones(len(vectors), dtype=torch.bool)
    off = (lifted - vectors).abs().amax(1)
    return ~(off <= _UNIT_TOLERANCE * vectors.abs().amax(1))


def _refuse(wrong: Tensor, ids: pl.Series, side: str, what: str) -> None:
    rows = wrong.nonzero().squeeze(1)
    if len(rows):
        example = ids[int(rows[0])]
        raise DivergedError(
            f"{len(rows):,} of {len(wrong):,} {side} vectors are {what} (for example "
            f"{'that of unknown users' if example is None else f'{side} {example!r}'}); "
            "nothing was exported"
        )


def _golden(
    user_ids: pl.Series, everyone: Tensor, item_ids: pl.Series, item_vectors: Tensor
) -> GoldenQueries:
    """Users at equal distances over the vocabulary, and the unknown one."""
    num_users = len(user_ids)
    chosen = np.unique(np.linspace(0, num_users - 1, min(num_users, GOLDEN_QUERIES)).astype(int))
    rows = torch.cat([torch.from_numpy(chosen), torch.tensor([num_users])])
    found = top_k(everyone[rows], item_vectors, min(GOLDEN_K, len(item_ids)))
    decoded = Vocabulary(item_ids).decode(found.item_idx.flatten().numpy()).to_list()
    k = found.item_idx.shape[1]
    return GoldenQueries(
        user_ids=user_ids.gather(chosen).extend_constant(None, 1),
        item_ids=[decoded[start : start + k] for start in range(0, len(decoded), k)],
        scores=found.scores,
    )
