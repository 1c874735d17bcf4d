"""Whether a store holds what was sent, and answers as the trainer would."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recclr.errors import StoreError
from recclr.export.bundle import EmbeddingBundle
from recclr.export.store import Store

# Between a store's arithmetic and ours, relative to the longest score of the query.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Verification:
    """What was compared.

    Attributes:
        num_vectors: read back and equal to the last bit. num_queries: answered like exact top-k.
        max_score_error: largest difference between an answer's score and the exact one.
    """

    num_vectors: int
    num_queries: int
    max_score_error: float


def verify(store: Store, bundle: EmbeddingBundle) -> Verification:
    """Read everything back and ask the golden queries.

    Ties may come in another order: an answer is right when its exact scores are those of the exact
    top-k.

    Raises:
        StoreError: says what differs, what was expected and what was found.
    """
    _same("items", store.items(), bundle.item_ids, bundle.item_vectors)
    _same("users", store.users(), bundle.user_ids, bundle.user_vectors)
    worst = _golden(store, bundle)
    return Verification(
        num_vectors=len(bundle.item_ids) + len(bundle.user_ids),
        num_queries=len(bundle.golden["queries"]),
        max_score_error=worst,
    )


def _same(side: str, found: tuple[pl.Series, Tensor], ids: pl.Series, vectors: Tensor) -> None:
    if len(found[0]) != len(ids):
        raise StoreError(f"verification: expected {len(ids):,} {side}, found {len(found[0]):,}")
    if found[0].to_list() != ids.to_list():
        raise StoreError(f"verification: the ids of the {side} differ from those that were sent")
    bits = vectors.numpy().view(np.uint32) != found[1].numpy().view(np.uint32)
    if bits.any():
        row = int(bits.any(1).argmax())
        raise StoreError(
            f"verification: {int(bits.any(1).sum()):,} vectors of the {side} differ, the first is "
            f"that of {ids[row]!r}"
        )


def _golden(store: Store, bundle: EmbeddingBundle) -> float:
    golden = bundle.golden
    rows = torch.tensor(golden["queries"], dtype=torch.int64)
    queries = bundle.user_vectors[rows]
    exact = torch.tensor(golden["scores"])
    k = exact.shape[1] if exact.ndim == 2 else 0
    places = dict(zip(bundle.item_ids.to_list(), range(len(bundle.item_ids)), strict=True))
    worst = 0.0
    for number, (ids, scores) in enumerate(store.search(queries, k) if k else []):
        idx = [places.get(item, -1) for item in ids.to_list()]
        if len(set(idx)) != k or -1 in idx:
            raise StoreError(
                f"verification: golden query {number} expected {k} items, found {len(set(idx))}"
            )
        truth = bundle.item_vectors[idx] @ queries[number]
        scale = max(float(exact[number].abs().max()), 1.0)
        errors = torch.stack(
            [truth.sort(descending=True).values - exact[number], scores - truth]
        ).abs()
        worst = max(worst, float(errors.max()))
        if float(errors.max()) > _TOLERANCE * scale:
            raise StoreError(
                f"verification: golden query {number} (user {bundle.user_ids[int(rows[number])]!r})"
                f" is not answered like exact top-{k}: a score is off by {float(errors.max()):.3g}"
            )
    return worst
