"""Proof that a store holds what the trainer made: compared bit for bit, and asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from recclr.data.vocabulary import Vocabulary
from recclr.errors import StoreError
from recclr.export.bundle import EmbeddingBundle
from recclr.export.store import Side, Store


@dataclass(frozen=True)
class VerificationReport:
    """What was compared.

    Attributes:
        num_items, num_users: rows whose ids and vectors were read back and are equal.
        num_queries: golden queries answered as by exact search, each also with its first half
            left out.
        k: items per query.
        max_score_difference: largest absolute difference of a score from the trainer's.
    """

    num_items: int
    num_users: int
    num_queries: int
    k: int
    max_score_difference: float


def verify(store: Store, bundle: EmbeddingBundle) -> VerificationReport:
    """Compare everything in ``store`` with ``bundle``.

    Raises:
        StoreError: names what differs, what was expected and what was found.
    """
    manifest = store.manifest
    facts = ("name", "version", "similarity", "embedding_dim")
    for fact in facts:
        _same(store, f"manifest {fact}", getattr(bundle, fact), getattr(manifest, fact))
    _same_vectors(
        store,
        "unknown user vector",
        bundle.unknown_user_vector[None],
        manifest.unknown_user_vector[None],
    )
    _compare_side(store, "item", bundle.item_ids, bundle.item_vectors, manifest.num_items)
    _compare_side(store, "user", bundle.user_ids, bundle.user_vectors, manifest.num_users)
    return VerificationReport(
        num_items=len(bundle.item_ids),
        num_users=len(bundle.user_ids),
        num_queries=len(bundle.golden.user_ids),
        k=bundle.golden.k,
        max_score_difference=_ask_golden(store, bundle),
    )


def _compare_side(store: Store, side: Side, ids: pl.Series, vectors: Tensor, promised: int) -> None:
    found_ids = store.read_ids(side)
    _same(store, f"number of {side}s in the manifest", len(ids), promised)
    _same(store, f"number of {side} ids", len(ids), len(found_ids))
    _same(store, f"type of {side} ids", ids.dtype, found_ids.dtype)
    wrong = (ids != found_ids).arg_true()
    if len(wrong):
        row = int(wrong[0])
        _same(store, f"{side} id in row {row:,}", ids[row], found_ids[row])
    found = store.read_vectors(side)
    if not found.isfinite().all():
        rows = (~found.isfinite().all(1)).nonzero().squeeze(1)
        example = ids[int(rows[0])]
        raise StoreError(
            f"{store.where}: {side} vectors: expected finite numbers, found {len(rows):,} rows "
            f"with others, for example {side} {example!r}"
        )
    _same_vectors(store, f"{side} vectors", vectors, found)


def _same_vectors(store: Store, what: str, expected: Tensor, found: Tensor) -> None:
    """Bit for bit, so that -0.0 is not 0.0 and nothing was rounded."""
    _same(store, f"shape of {what}", tuple(expected.shape), tuple(found.shape))
    unequal = (expected.view(torch.int32) != found.view(torch.int32)).any(1)
    if unequal.any():
        row = int(unequal.nonzero()[0])
        column = int((expected[row].view(torch.int32) != found[row].view(torch.int32)).nonzero()[0])
        _same(
            store,
            f"{what} ({int(unequal.sum()):,} rows differ), row {row:,}, coordinate {column}",
            float(expected[row, column]),
            float(found[row, column]),
        )


def _same(store: Store, what: str, expected: object, found: object) -> None:
    # repr tells -0.0 from 0.0 where == does not.
    if expected != found or repr(expected) != repr(found):
        raise StoreError(f"{store.where}: {what}: expected {expected!r}, found {found!r}")


def _ask_golden(store: Store, bundle: EmbeddingBundle) -> float:
    """All golden queries, plain and with the first half of the answer left out."""
    golden, half = bundle.golden, bundle.golden.k // 2
    queries = store.user_vectors(golden.user_ids)
    found, scores = store.search(queries, golden.k)
    difference = _check_answers(store, bundle, queries, 0, found, scores)
    if half:
        first = [items[:half] for items in found]
        found, scores = store.search(queries, golden.k - half, exclude=first)
        for row, (items, left_out) in enumerate(zip(found, first, strict=True)):
            both = set(items) & set(left_out)
            _same(store, f"golden query {row}: excluded items in the answer", set(), both)
        difference = max(difference, _check_answers(store, bundle, queries, half, found, scores))
    return difference


def _check_answers(
    store: Store,
    bundle: EmbeddingBundle,
    queries: Tensor,
    first_rank: int,
    found: Sequence[list[int | str]],
    scores: Tensor,
) -> float:
    """Equal lists, but for items whose scores tie, which may stand in any order.

    A list of distinct items whose true scores equal the expected ones rank by rank is a top-k.
    """
    expected = bundle.golden.scores[:, first_rank:]
    _same(store, "number of answers", len(expected), len(found))
    width = expected.shape[1]
    for row, items in enumerate(found):
        _same(store, f"golden query {row}: number of distinct items", width, len(set(items)))
    ids = pl.Series([item for items in found for item in items], dtype=bundle.item_ids.dtype)
    rows = torch.from_numpy(Vocabulary(bundle.item_ids).encode(ids)).long()
    vectors = bundle.item_vectors[rows].view(len(found), width, -1)
    true = (vectors.double() * queries.double()[:, None]).sum(2)
    tolerance = store.manifest.score_tolerance(queries)[:, None]
    for what, values in (("scores", scores), ("true scores of the items", true)):
        off = (values.double() - expected.double()).abs()
        wrong = ~(off <= tolerance)
        if wrong.any():
            row, rank = divmod(int(wrong.flatten().nonzero()[0]), width)
            user = bundle.golden.user_ids[row]
            place = first_rank + rank
            answer = bundle.golden.item_ids[row][place]
            raise StoreError(
                f"{store.where}: golden query of user {user!r}, rank {place + 1} ({what}): "
                f"expected item {answer!r} with {float(expected[row, rank]):.7f}, found "
                f"{found[row][rank]!r} with {float(values[row, rank]):.7f}"
            )
    return float((scores - expected).abs().max())
