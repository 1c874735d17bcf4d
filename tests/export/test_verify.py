from dataclasses import replace

import polars as pl
import pytest
import torch

from recclr.errors import StoreError
from recclr.export import Store, verify
from recclr.export.bundle import GoldenQueries
from recclr.export.manifest import Manifest
from recclr.ranking import TopK
from recclr.topk import top_k


class Memory(Store):
    """A store whose parts can be exchanged one by one."""

    def __init__(self, bundle):
        self.where, self.home = "memory", None
        self.manifest = Manifest.of(bundle, {})
        self.ids = {"item": bundle.item_ids, "user": bundle.user_ids}
        self.vectors = {"item": bundle.item_vectors.clone(), "user": bundle.user_vectors.clone()}
        self.answer = lambda found, seen: found

    def read_ids(self, side):
        return self.ids[side]

    def read_vectors(self, side, rows=None):
        return self.vectors[side] if rows is None else self.vectors[side][rows]

    def nearest(self, queries, k, *, seen=None):
        return self.answer(top_k(queries, self.vectors["item"], k, seen=seen), seen)

    def num_bytes(self):
        return 0


@pytest.fixture(params=["integer", "string"])
def bundle(make_bundle, request):
    return make_bundle(kind=request.param)


@pytest.fixture
def store(bundle):
    return Memory(bundle)


def refused(store, bundle, words):
    with pytest.raises(StoreError, match=f"(?s)^memory: .*{words}"):
        verify(store, bundle)


def test_a_whole_store_passes_and_the_report_counts(store, bundle):
    report = verify(store, bundle)
    assert (report.num_items, report.num_users) == (60, 37)
    assert (report.num_queries, report.k) == (38, 20)
    assert report.max_score_difference == 0


@pytest.mark.parametrize(("num_items", "num_users"), [(1, 0), (1, 1), (2, 3)])
def test_the_smallest_stores_pass(make_bundle, num_items, num_users):
    bundle = make_bundle(num_items=num_items, num_users=num_users)
    assert verify(Memory(bundle), bundle).num_queries == num_users + 1


@pytest.mark.parametrize(
    ("fact", "value"),
    [("name", "other"), ("version", "0" * 16), ("similarity", "dot"), ("embedding_dim", 7)],
)
def test_another_manifest(store, bundle, fact, value):
    store.manifest = replace(store.manifest, **{fact: value})
    expected = getattr(bundle, fact)
    refused(store, bundle, f"manifest {fact}: expected {expected!r}, found {value!r}")


@pytest.mark.parametrize("side", ["item", "user"])
def test_a_wrong_count_in_the_manifest(store, bundle, side):
    count = len(store.ids[side])
    store.manifest = replace(store.manifest, **{f"num_{side}s": count + 1})
    refused(store, bundle, f"number of {side}s .*expected {count}, found {count + 1}")


def test_another_vector_of_unknown_users(store, bundle):
    vector = bundle.unknown_user_vector.clone()
    vector[4] = torch.nextafter(vector[4], torch.tensor(2.0))
    store.manifest = replace(store.manifest, unknown_user_vector=vector)
    refused(store, bundle, r"unknown user vector \(1 rows differ\), row 0, coordinate 4")


@pytest.mark.parametrize("side", ["item", "user"])
def test_ids_that_are_missing_doubled_swapped_changed_or_of_another_type(store, bundle, side):
    ids = store.ids[side]
    swapped = ids.gather([0, 2, 1, *range(3, len(ids))])
    other = ids.gather([0, 1, 1, *range(3, len(ids))])
    for wrong, words in (
        (ids[:-1], f"number of {side} ids: expected {len(ids)}, found {len(ids) - 1}"),
        (
            pl.concat([ids, ids[:1]]),
            f"number of {side} ids: expected {len(ids)}, found {len(ids) + 1}",
        ),
        (swapped, f"{side} id in row 1: expected {ids[1]!r}, found {ids[2]!r}"),
        (other, f"{side} id in row 2: expected {ids[2]!r}, found {ids[1]!r}"),
        (ids.cast(pl.String if ids.dtype.is_integer() else pl.Categorical), "type of"),
    ):
        store.ids[side] = wrong
        refused(store, bundle, words)


@pytest.mark.parametrize("side", ["item", "user"])
def test_one_bit_of_one_vector(store, bundle, side):
    vectors = store.vectors[side]
    vectors.view(torch.int32)[5, 3] ^= 1
    refused(store, bundle, rf"{side} vectors \(1 rows differ\), row 5, coordinate 3: expected ")


@pytest.mark.parametrize("side", ["item", "user"])
def test_the_sign_of_a_zero(make_bundle, side):
    zeros = {f"{side}_vectors": torch.eye(5, 6)}
    bundle = make_bundle(**zeros)
    store = Memory(bundle)
    store.vectors[side][2, 1] = -0.0
    refused(store, bundle, r"row 2, coordinate 1: expected 0.0, found -0.0")


@pytest.mark.parametrize("side", ["item", "user"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(store, bundle, side, value):
    store.vectors[side][[3, 9], 2] = value
    refused(store, bundle, f"{side} vectors: expected finite numbers, found 2 rows.*{side} ")


@pytest.mark.parametrize("side", ["item", "user"])
def test_rows_in_another_order_or_shape(store, bundle, side):
    vectors = store.vectors[side]
    store.vectors[side] = vectors.flip(0)
    refused(store, bundle, rf"{side} vectors \(\d+ rows differ\), row 0")
    store.vectors[side] = vectors[:-1]
    refused(store, bundle, f"shape of {side} vectors")
    store.vectors[side] = vectors[:, :-1]
    refused(store, bundle, f"shape of {side} vectors")


def exchanged(found, first, second):
    """Two ranks of every answer exchanged, each score with its item."""
    order = list(range(found.item_idx.shape[1]))
    order[first], order[second] = order[second], order[first]
    return TopK(found.item_idx[:, order], found.scores[:, order])


def with_item(found, row, rank, item):
    item_idx = found.item_idx.clone()
    item_idx[row, rank] = item
    return TopK(item_idx, found.scores)


def off_by(found, amount):
    scores = found.scores.clone()
    scores[7, 4] += amount
    return TopK(found.item_idx, scores)


WRONG_SEARCH = {
    "two ranks exchanged": (lambda found, seen: exchanged(found, 3, 4), "rank 4 "),
    "items exchanged under their scores": (
        lambda found, seen: TopK(exchanged(found, 3, 4).item_idx, found.scores),
        r"rank 4 \(true scores",
    ),
    "an item twice": (
        lambda found, seen: with_item(found, 7, 4, int(found.item_idx[7, 0])),
        "golden query 7: number of distinct items: expected 20, found 19",
    ),
    "an item that does not belong there": (
        lambda found, seen: with_item(found, 7, 4, worst_of(found, 7)),
        r"rank 5 \(true scores",
    ),
    "a score a little off": (lambda found, seen: off_by(found, 1e-4), r"rank 5 \(scores\)"),
    "a score that is no number": (
        lambda found, seen: off_by(found, float("nan")),
        r"rank 5 \(scores\)",
    ),
    "an answer cut short": (
        lambda found, seen: with_item(found, 7, found.item_idx.shape[1] - 1, -1),
        "golden query 7: number of distinct items",
    ),
    "an answer to one query too few": (
        lambda found, seen: TopK(found.item_idx[:-1], found.scores[:-1]),
        "number of answers: expected 38, found 37",
    ),
    "the answers of other queries": (
        lambda found, seen: TopK(found.item_idx.flip(0), found.scores.flip(0)),
        "golden query of user",
    ),
}


def worst_of(found, row):
    inside = set(found.item_idx[row].tolist())
    return next(item for item in range(60) if item not in inside)


@pytest.mark.parametrize("what", WRONG_SEARCH)
def test_a_search_that_is_wrong(store, bundle, what):
    store.answer, words = WRONG_SEARCH[what]
    refused(store, bundle, words)


def test_a_search_that_forgets_what_to_leave_out(store, bundle):
    def forgetful(found, seen):
        return found if seen is None else top_k(queries, bundle.item_vectors, 10)

    queries = torch.cat([bundle.user_vectors, bundle.unknown_user_vector[None]])
    store.answer = forgetful
    refused(store, bundle, "golden query 0: excluded items in the answer: expected set")


def test_a_search_that_is_wrong_only_with_items_left_out(store, bundle):
    store.answer = lambda found, seen: found if seen is None else exchanged(found, 0, 1)
    refused(store, bundle, "rank 11 ")


def test_small_vectors_are_judged_as_strictly_as_large_ones(make_bundle):
    plain = make_bundle()
    for size in (1e-6, 1e6):
        bundle = make_bundle(
            similarity="dot",
            item_vectors=size * plain.item_vectors,
            user_vectors=size * plain.user_vectors,
            unknown_user_vector=size * plain.unknown_user_vector,
        )
        store = Memory(bundle)
        assert verify(store, bundle).max_score_difference == 0
        store.answer = lambda found, seen: TopK(exchanged(found, 3, 4).item_idx, found.scores)
        refused(store, bundle, "true scores")


def test_ties_may_stand_in_any_order(make_bundle):
    items = torch.eye(6).repeat_interleave(5, 0)
    bundle = make_bundle(item_vectors=items, user_vectors=torch.eye(6).flip(0))
    store = Memory(bundle)

    def other_way_round(found, seen):
        # Each user's best five items tie, and among the others all do.
        return exchanged(found, 0, 4) if seen is None else found

    store.answer = other_way_round
    assert verify(store, bundle).max_score_difference == 0
    store.answer = lambda found, seen: exchanged(found, 4, 5)
    refused(store, bundle, "rank 5 ")


def test_a_little_rounding_passes_and_is_reported(store, bundle):
    store.answer = lambda found, seen: off_by(found, 3e-7)
    assert verify(store, bundle).max_score_difference == pytest.approx(3e-7, rel=0.2)


def test_wrong_golden_scores_of_the_bundle_do_not_pass_either(store, bundle):
    golden = bundle.golden
    wrong = GoldenQueries(golden.user_ids, golden.item_ids, golden.scores + 1e-3)
    refused(store, replace(bundle, golden=wrong), r"rank 1 \(scores\)")
