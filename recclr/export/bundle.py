"""What is exported: both towers' vectors, the ids they belong to, and answers to check them by."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recclr.errors import ConfigError, StoreError
from recclr.topk import top_k

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")
_NUM_GOLDEN, _GOLDEN_K = 100, 10
_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class EmbeddingBundle:
    """Embeddings ready for a store; everything is checked when it is made.

    Scores are dot products, which for ``cosine`` are cosines, since the vectors have length 1.

    Attributes:
        name: table name in the store: a letter, then letters, digits, '_'; at most 63.
        item_ids: [V] raw ids, in the order of their index. item_vectors: float32 [V, D].
        user_ids: [U] raw ids. user_vectors: float32 [U, D].
        unknown_user: float32 [D], the query of a user that is not in the store.
        similarity: ``cosine`` or ``dot``.
        facts: JSON values about the model, such as the cut-off of its data.

    Raises:
        ConfigError: the name. StoreError: shapes, repeated ids, values that are not finite, or
        under cosine vectors that are not of length 1.
    """

    name: str
    item_ids: pl.Series
    item_vectors: Tensor
    user_ids: pl.Series
    user_vectors: Tensor
    unknown_user: Tensor
    similarity: str = "cosine"
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_name(self.name)
        sides = (
            ("item", self.item_ids, self.item_vectors),
            ("user", self.user_ids, self.user_vectors),
        )
        for side, ids, vectors in sides:
            _check(side, ids, vectors, self.similarity)
        dim = self.item_vectors.shape[1]
        if not len(self.item_ids) or self.user_vectors.shape[1] != dim:
            raise StoreError(
                f"expected items, and users of the same dimension, found {len(self.item_ids)} "
                f"items of {dim} and users of {self.user_vectors.shape[1]} dimensions"
            )
        if self.unknown_user.shape != (dim,) or not torch.isfinite(self.unknown_user).all():
            raise StoreError(f"the vector of unknown users must be {dim} finite numbers")

    @property
    def embedding_dim(self) -> int:
        return self.item_vectors.shape[1]

    @cached_property
    def version(self) -> str:
        """16 hex digits that follow from ids and vectors alone."""
        digest = hashlib.sha256()
        sides = ((self.item_ids, self.item_vectors), (self.user_ids, self.user_vectors))
        for ids, vectors in sides:
            digest.update(f"{ids.dtype} {tuple(vectors.shape)} ".encode())
            digest.update("\0".join(map(str, ids.to_list())).encode())
            digest.update(np.ascontiguousarray(vectors.numpy()).tobytes())
        digest.update(self.unknown_user.numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def golden(self) -> dict[str, Any]:
        """Queries spread over the users, with their exact answers: what a store must reproduce.

        Returns:
            ``queries`` (index of users), ``items`` (index, best first), ``scores``; nothing is
            left out as seen.
        """
        count = min(_NUM_GOLDEN, len(self.user_ids))
        queries = torch.linspace(0, max(len(self.user_ids) - 1, 0), count).long()
        found = top_k(
            self.user_vectors[queries],
            self.item_vectors,
            min(_GOLDEN_K, len(self.item_ids)),
        )
        return {
            "queries": queries.tolist(),
            "items": found.item_idx.tolist(),
            "scores": found.scores.tolist(),
        }

    def manifest(self) -> dict[str, Any]:
        """What a reader needs beside the vectors, as JSON values."""
        return {
            "format": 1,
            "name": self.name,
            "version": self.version,
            "similarity": self.similarity,
            "metric": "dot",
            "embedding_dim": self.embedding_dim,
            "num_items": len(self.item_ids),
            "num_users": len(self.user_ids),
            "unknown_user": self.unknown_user.tolist(),
            "facts": json.loads(json.dumps(dict(self.facts))),
            "golden": self.golden,
        }


def require_name(name: str) -> None:
    """Refuse what is no plain table name.

    Raises:
        ConfigError: see ``EmbeddingBundle.name``.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name!r}: expected a letter, then letters, digits or '_', at most 63 in all"
        )


def _check(side: str, ids: pl.Series, vectors: Tensor, similarity: str) -> None:
    if vectors.ndim != 2 or len(vectors) != len(ids) or vectors.dtype != torch.float32:
        raise StoreError(
            f"expected float32 vectors [{len(ids)}, D] for the {side}s, found {vectors.dtype} "
            f"{tuple(vectors.shape)}"
        )
    if ids.null_count() or ids.n_unique() < len(ids):
        raise StoreError(f"the {side} ids must be distinct and not null")
    broken = ~torch.isfinite(vectors).all(1)
    if broken.any():
        row = int(broken.nonzero()[0])
        raise StoreError(
            f"{int(broken.sum()):,} {side} vectors are not finite, the first is that of "
            f"{ids[row]!r}; nothing was written"
        )
    if similarity == "cosine" and len(vectors):
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        worst = float((lengths - 1).abs().max())
        if worst > _UNIT_TOLERANCE:
            raise StoreError(
                f"under cosine the {side} vectors must have length 1, found one off by {worst:.3g}"
            )
