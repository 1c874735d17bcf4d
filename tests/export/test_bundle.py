import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recclr.errors import ConfigError, DataError, DivergedError, ShapeError
from recclr.export import ModelFacts
from recclr.similarity import as_candidates, as_queries

BIG = 2**53 + 1


def dots(user, items):
    return [float(np.dot(user.double().numpy(), item.double().numpy())) for item in items]


@pytest.mark.parametrize("kind", ["integer", "string"])
def test_ids_and_vectors_are_carried_unchanged(make_bundle, kind):
    items, users = torch.randn(5, 3), torch.randn(4, 3)
    unknown = torch.randn(3)
    bundle = make_bundle(
        kind=kind,
        similarity="dot",
        item_vectors=items.double(),
        user_vectors=users,
        unknown_user_vector=unknown,
        name="a.B-c_9",
    )
    assert bundle.item_ids.dtype == (pl.Int64 if kind == "integer" else pl.String)
    assert bundle.item_ids.to_list()[0] == (BIG + 100 if kind == "integer" else "é 100")
    assert torch.equal(bundle.item_vectors, items)
    assert torch.equal(bundle.user_vectors, users)
    assert torch.equal(bundle.unknown_user_vector, unknown)
    assert (bundle.name, bundle.similarity, bundle.embedding_dim) == ("a.B-c_9", "dot", 3)
    for part in (bundle.item_vectors, bundle.user_vectors, bundle.unknown_user_vector):
        assert part.dtype == torch.float32
        assert part.is_contiguous()


def test_vectors_that_need_a_gradient_or_lie_transposed_are_taken(make_bundle):
    items = torch.randn(3, 5).T.requires_grad_()
    bundle = make_bundle(similarity="dot", item_vectors=items, dim=3)
    assert not bundle.item_vectors.requires_grad
    assert torch.equal(bundle.item_vectors, items.detach())


def test_golden_queries_have_the_answers_of_a_slow_search(make_bundle):
    bundle = make_bundle(num_items=60, num_users=37)
    golden = bundle.golden
    assert golden.k == 20
    assert golden.user_ids.to_list() == [*bundle.user_ids.to_list(), None]
    everyone = [*bundle.user_vectors, bundle.unknown_user_vector]
    for query, (user, items) in enumerate(zip(everyone, golden.item_ids, strict=True)):
        scores = dots(user, bundle.item_vectors)
        best = sorted(range(60), key=lambda row, scores=scores: -scores[row])[:20]
        assert items == bundle.item_ids.gather(best).to_list()
        assert golden.scores[query].tolist() == pytest.approx([scores[row] for row in best], 1e-5)


@pytest.mark.parametrize(("num_items", "k"), [(1, 1), (19, 19), (20, 20), (21, 20)])
def test_golden_queries_of_a_small_corpus_ask_for_all_of_it(make_bundle, num_items, k):
    golden = make_bundle(num_items=num_items).golden
    assert golden.k == k
    assert {len(items) for items in golden.item_ids} == {k}


@pytest.mark.parametrize(("num_users", "asked"), [(0, 0), (1, 1), (100, 100), (253, 100)])
def test_golden_users_are_spread_from_the_first_to_the_last(make_bundle, num_users, asked):
    bundle = make_bundle(num_users=num_users)
    rows = [bundle.user_ids.to_list().index(user) for user in bundle.golden.user_ids[:-1]]
    assert len(rows) == asked
    assert bundle.golden.user_ids[-1] is None
    if asked:
        assert (rows[0], rows[-1]) == (0, num_users - 1)
        assert len(set(np.diff(rows))) <= 2


def test_num_bytes_counts_vectors_and_ids(make_bundle):
    bundle = make_bundle(kind="integer", num_items=11, num_users=13, dim=7)
    assert bundle.num_bytes == (11 + 13) * (7 * 4 + 8)


def test_zero_vectors_of_users_are_allowed_and_of_items_not(make_bundle):
    users = torch.zeros(3, 6)
    bundle = make_bundle(user_vectors=users, unknown_user_vector=torch.zeros(6))
    assert torch.equal(bundle.user_vectors, users)
    items = torch.eye(6)
    items[4] = 0
    with pytest.raises(DivergedError, match=r"1 of 6 item vectors are all zeros.*item 'é 128'"):
        make_bundle(item_vectors=items, item_ids=pl.Series([f"é {100 + 7 * i}" for i in range(6)]))


@pytest.mark.parametrize(
    "name", ["", ".a", "-a", "a b", "a/b", "../a", "é", "a\n", "x" * 65, "a\0"]
)
def test_names_that_are_not_plain_are_refused(make_bundle, name):
    with pytest.raises(ConfigError, match="at most 64 letters"):
        make_bundle(name=name)
    assert make_bundle(name="x" * 64).name == "x" * 64


def test_a_similarity_that_is_not_known_is_refused(make_bundle):
    with pytest.raises(ConfigError, match=r"'cosine', 'dot'.*found 'l2'"):
        make_bundle(similarity="l2")


@pytest.mark.parametrize("side", ["item", "user"])
@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["a", None, "b"], "no nulls, found 1"),
        (["a", "b", "a"], "distinct ids, found 1 repeated, for example 'a'"),
        ([1.0, 2.0, 3.0], "floats"),
        ([True, False, None], "integers or strings"),
    ],
)
def test_ids_that_cannot_be_keys_are_refused(make_bundle, side, values, words):
    vectors = {f"{side}_vectors": torch.eye(3, 6)}
    with pytest.raises(DataError, match=f"the {side} ids to export.*{words}"):
        make_bundle(**vectors, **{f"{side}_ids": pl.Series(values)})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"item_vectors": torch.eye(4, 6), "item_ids": pl.Series(range(5))}, r"item .*\(5, 6\)"),
        ({"item_vectors": torch.eye(6, 5)}, r"item vectors: expected \(6, 6\).*found \(6, 5\)"),
        ({"user_vectors": torch.eye(4, 7)}, r"user vectors: expected \(4, 6\).*found \(4, 7\)"),
        ({"user_vectors": torch.ones(4)}, r"user vectors: expected \(4, 6\).*found \(4,\)"),
        ({"unknown_user_vector": torch.eye(1, 6)}, r"unknown user vector \[D\], found \(1, 6\)"),
        ({"unknown_user_vector": torch.empty(0)}, r"unknown user vector \[D\], found \(0,\)"),
        ({"item_vectors": torch.empty(0, 6)}, "no item to export"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(make_bundle, wrong, words):
    with pytest.raises(ShapeError, match=words):
        make_bundle(**wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("part", ["item_vectors", "user_vectors", "unknown_user_vector"])
def test_numbers_that_no_store_should_see_are_refused(make_bundle, part, value):
    vectors = torch.eye(5, 6)
    vectors[3, 1] = vectors[3, 2] = value
    named = {"item_vectors": "item 'é 101'", "user_vectors": "user 'é 501'"}
    with pytest.raises(DivergedError, match=r"1 of .* not finite.*nothing was exported") as caught:
        make_bundle(**{part: vectors[3] if part == "unknown_user_vector" else vectors})
    assert named.get(part, "that of unknown users") in str(caught.value)


@pytest.mark.parametrize("part", ["item_vectors", "user_vectors", "unknown_user_vector"])
def test_cosine_promises_unit_length_and_dot_does_not(make_bundle, part):
    vectors = torch.eye(5, 6)
    vectors[2] *= 1.01
    wrong = {part: vectors[2] if part == "unknown_user_vector" else vectors}
    with pytest.raises(DivergedError, match="not of unit length"):
        make_bundle(**wrong)
    assert make_bundle(**wrong, similarity="dot").similarity == "dot"


@pytest.mark.parametrize("part", ["item_vectors", "user_vectors", "unknown_user_vector"])
def test_euclidean_promises_lifted_vectors(make_bundle, part):
    draws = torch.Generator().manual_seed(0)
    items = as_candidates(torch.randn(5, 4, generator=draws) * 9, "euclidean")
    users = as_queries(torch.randn(4, 4, generator=draws), "euclidean")
    right = {"item_vectors": items, "user_vectors": users[:3], "unknown_user_vector": users[3]}
    assert make_bundle(**right, similarity="euclidean").similarity == "euclidean"
    sides = (items[:4], users)
    other = sides[0] if part != "item_vectors" else sides[1]
    for wrong in (torch.eye(4, 6), torch.zeros(4, 6), users * 1.01, items[:4] * 0.99, other):
        if part == "item_vectors" and not wrong.any():
            continue
        given = right | {part: wrong[2] if part == "unknown_user_vector" else wrong}
        with pytest.raises(DivergedError, match="vectors are not lifted"):
            make_bundle(**given, similarity="euclidean")
    narrow = {name: torch.ones(3, 1) for name in ("item_vectors", "user_vectors")}
    with pytest.raises(DivergedError, match="not lifted"):
        make_bundle(**narrow, unknown_user_vector=torch.ones(1), similarity="euclidean")


def test_a_score_of_what_is_accepted_is_finite(make_bundle):
    long = 1.8e19 * torch.eye(3, 6)
    bundle = make_bundle(item_vectors=long, user_vectors=long, similarity="dot")
    assert bundle.golden.scores.isfinite().all()
    assert bundle.golden.scores.max() > 3e38
    with pytest.raises(DivergedError, match="3 of 3 item vectors are not finite"):
        make_bundle(item_vectors=1.1 * long, similarity="dot")


def test_the_version_depends_on_content_and_on_nothing_else(make_bundle):
    version = make_bundle().version
    assert len(version) == 16
    assert int(version, 16) >= 0
    assert make_bundle().version == version
    assert make_bundle(name="other", facts=ModelFacts("later")).version == version


def test_every_bit_of_the_content_changes_the_version(make_bundle):
    items, users, unknown = torch.eye(4, 6), torch.zeros(5, 6), torch.zeros(6)
    base = {"item_vectors": items, "user_vectors": users, "unknown_user_vector": unknown}
    names = [pl.Series(["ab", "c", "d", "e"]), pl.Series(["a", "bc", "d", "e"])]
    numbers = pl.Series([1, 2, 3, 4])
    next_up = items.clone()
    next_up[3, 3] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    minus = torch.tensor([0.0, 0.0, -0.0, 0.0, 0.0, 0.0])
    bundles = [
        make_bundle(**base),
        make_bundle(**base, similarity="dot"),
        make_bundle(**base | {"item_vectors": next_up}),
        make_bundle(**base | {"item_vectors": items.flip(0)}),
        make_bundle(**base | {"unknown_user_vector": minus}),
        make_bundle(**base | {"user_vectors": users[:4]}),
        make_bundle(**base | {"user_vectors": torch.cat([users[:4], minus[None]])}),
        *(make_bundle(**base, item_ids=ids) for ids in names),
        make_bundle(**base, item_ids=numbers),
        make_bundle(**base, item_ids=numbers.cast(pl.Int32)),
        make_bundle(**base, item_ids=numbers.cast(pl.UInt64)),
        make_bundle(**base, item_ids=numbers.cast(pl.String)),
        make_bundle(**base, item_ids=numbers.reverse()),
        make_bundle(**base, user_ids=pl.Series(["1", "2", "3", "4", "5"])),
    ]
    assert len({bundle.version for bundle in bundles}) == len(bundles)


@given(st.lists(st.text(max_size=3), min_size=2, max_size=2, unique=True), st.data())
def test_texts_that_join_to_the_same_have_different_versions(make_bundle, texts, data):
    whole = texts[0] + texts[1]
    cut = data.draw(st.integers(0, len(whole)))
    other = [whole[:cut], whole[cut:]]
    if other == texts or other[0] == other[1]:
        return
    versions = {
        make_bundle(item_vectors=torch.eye(2, 6), num_users=1, item_ids=pl.Series(pair)).version
        for pair in (texts, other)
    }
    assert len(versions) == 2
