"""One contract, held by every kind of store: what goes in comes out, and search is exact."""

import itertools
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch

from recclr.errors import ConfigError, DataError, ShapeError, StoreError
from recclr.export import export_embeddings, open_store, parse_target, verify

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(params=["integer", "string"])
def bundle(request, make_bundle):
    return make_bundle(kind=request.param)


def folder_of(target):
    return parse_target(target).location


def tree(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def holds(target, bundle):
    store = open_store(target, bundle.name)
    verify(store, bundle)
    return store.manifest.version == bundle.version


def test_what_was_written_is_read_back(target, bundle):
    report = export_embeddings(bundle, target)
    assert (report.name, report.version) == ("catalogue", bundle.version)
    assert (report.num_items, report.num_users, report.embedding_dim) == (60, 37, 6)
    assert report.target == target
    assert not report.unchanged
    assert report.verification.num_queries == 38
    assert report.verification.max_score_difference < 1e-6
    store = open_store(target)
    for side, ids, vectors in (
        ("item", bundle.item_ids, bundle.item_vectors),
        ("user", bundle.user_ids, bundle.user_vectors),
    ):
        assert store.read_ids(side).equals(ids, check_dtypes=True)
        assert torch.equal(store.read_vectors(side), vectors)
        rows = torch.tensor([5, 0, 36, 5, 1])
        assert torch.equal(store.read_vectors(side, rows), vectors[rows])
        assert store.read_vectors(side, torch.empty(0, dtype=torch.int64)).shape == (0, 6)
    assert store.manifest.facts == bundle.facts


@pytest.mark.parametrize(
    "dtype", [pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64]
)
def test_the_extremes_of_every_integer_type(target, make_bundle, dtype):
    low, high = pl.select(dtype.min().alias("low"), dtype.max().alias("high")).row(0)
    ids = pl.Series([high, low, 7], dtype=dtype)
    bundle = make_bundle(item_vectors=torch.eye(3, 6), item_ids=ids, num_users=1)
    export_embeddings(bundle, target)
    found, _ = open_store(target).search(torch.eye(3, 6), 1, exclude=[[], [], [low]])
    assert found == [[high], [low], [7]]


def test_awkward_text_as_ids(target, make_bundle):
    texts = [
        "",
        " ",
        "a\0b",
        "a",
        "A",
        "\u00e9",
        "e\u0301",
        "\U0001f600",
        "'; --",
        '"',
        "a/b",
        "nan",
        "null",
    ]
    bundle = make_bundle(item_vectors=torch.eye(13), item_ids=pl.Series(texts), num_users=2, dim=13)
    export_embeddings(bundle, target)
    found, _ = open_store(target).search(torch.eye(13), 1)
    assert found == [[text] for text in texts]


@pytest.mark.parametrize(("num_items", "num_users", "dim"), [(1, 0, 1), (1, 1, 3), (21, 0, 5)])
def test_the_smallest_exports(target, make_bundle, num_items, num_users, dim):
    bundle = make_bundle(num_items=num_items, num_users=num_users, dim=dim)
    export_embeddings(bundle, target)
    store = open_store(target)
    assert store.user_vectors(["nobody"]).tolist() == [bundle.unknown_user_vector.tolist()]
    assert store.read_vectors("user").shape == (num_users, dim)
    assert store.read_ids("user").dtype == pl.String
    assert holds(target, bundle)


@pytest.mark.parametrize("name", ["a..b.lance", "recclr", "9-_", "CURRENT", "z" * 64])
def test_every_plain_name(target, make_bundle, name):
    bundle = make_bundle(name=name, num_items=3, num_users=2)
    export_embeddings(bundle, target)
    assert holds(target, bundle)


@pytest.mark.parametrize("folder", ["a b:~", "é%20'\"&;$", "#?[x]*"])
def test_every_folder_and_nothing_beside_it(tmp_path, make_bundle, target, folder):
    target = f"{parse_target(target).kind}:{tmp_path / 'only' / folder}"
    bundle = make_bundle(num_items=3, num_users=2)
    export_embeddings(bundle, target)
    export_embeddings(make_bundle(num_items=4, num_users=2), target)
    export_embeddings(bundle, target)
    assert holds(target, bundle)
    assert [path.name for path in (tmp_path / "only").iterdir()] == [folder]


def test_a_relative_folder_follows_the_working_folder(tmp_path, monkeypatch, make_bundle, target):
    kind = parse_target(target).kind
    monkeypatch.chdir(tmp_path)
    export_embeddings(make_bundle(), f"{kind}://here")
    assert holds(f"{kind}:{tmp_path}/here", make_bundle())


def test_the_same_again_writes_nothing_and_is_verified(target, bundle):
    first = export_embeddings(bundle, target)
    before = tree(folder_of(target))
    second = export_embeddings(bundle, target)
    assert second.unchanged
    assert "(there already)" in str(second)
    assert second.verification == first.verification
    assert second.bytes == first.bytes
    assert tree(folder_of(target)) == before


def test_a_second_version_replaces_the_first_and_a_third_brings_it_back(target, make_bundle):
    first = make_bundle()
    other = make_bundle(kind="integer", seed=1, num_items=41, num_users=5, dim=9)
    for bundle in (first, other, first, other):
        assert not export_embeddings(bundle, target).unchanged
        assert holds(target, bundle)


def test_an_open_store_stays_at_its_version(target, make_bundle):
    first, second = make_bundle(), make_bundle(seed=1)
    export_embeddings(first, target)
    opened = open_store(target)
    export_embeddings(second, target)
    assert opened.manifest.version == first.version
    verify(opened, first)
    assert holds(target, second)


def test_bytes_are_those_of_files(target, make_bundle):
    bundle = make_bundle(num_items=2000, num_users=10, dim=16)
    report = export_embeddings(bundle, target)
    whole = sum(len(data) for data in tree(folder_of(target)).values())
    assert bundle.num_bytes * 0.7 < report.bytes <= whole
    assert whole - report.bytes < 50_000
    assert open_store(target).num_bytes() == report.bytes


def test_nothing_there(target):
    with pytest.raises(StoreError, match=r"holds no exported embeddings named 'catalogue'.*--to"):
        open_store(target)
    assert not folder_of(target).exists()
    with pytest.raises(ConfigError, match="at most 64 letters"):
        open_store(target, "../x")


def test_users_get_their_vector_and_everyone_else_that_of_the_unknown(target, bundle):
    export_embeddings(bundle, target)
    store = open_store(target)
    known = bundle.user_ids.gather([3, 36, 3])
    stranger = 1 if bundle.user_ids.dtype.is_integer() else "stranger"
    asked = [*known.to_list(), stranger, None]
    unknown = bundle.unknown_user_vector
    expected = torch.stack([*bundle.user_vectors[[3, 36, 3]], unknown, unknown])
    assert torch.equal(store.user_vectors(asked), expected)
    assert torch.equal(store.user_vectors(pl.Series("u", asked)), expected)
    assert store.user_vectors([]).shape == (0, 6)
    assert torch.equal(store.user_vectors([None]), unknown[None])


def test_ids_of_another_type_are_refused(target, bundle):
    export_embeddings(bundle, target)
    store = open_store(target)
    other = ["a"] if bundle.user_ids.dtype.is_integer() else [1]
    for ids, words in ((other, "holds"), ([1.5], "floats"), ([1, "a"], "found a mixture")):
        with pytest.raises(DataError, match=words):
            store.user_vectors(ids)
        with pytest.raises(DataError, match=words):
            store.search(torch.ones(1, 6), 3, exclude=[ids])


def slow_search(bundle, query, k, left_out):
    """Exact scores by Python integers; ties by row."""
    rows = [
        (-sum(int(a) * int(b) for a, b in zip(query, item, strict=True)), row)
        for row, item in enumerate(bundle.item_vectors.tolist())
        if bundle.item_ids[row] not in left_out
    ]
    best = sorted(rows)[:k]
    return [bundle.item_ids[row] for _, row in best], [-float(score) for score, _ in best]


def test_search_is_exact_with_ties_and_exclusions(target, make_bundle):
    # Whole numbers, so that float32 is exact and the order of many equal scores is forced.
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randint(-2, 3, (60, 4), generator=generator).float()
    vectors[vectors.abs().sum(1) == 0] = 1
    bundle = make_bundle(item_vectors=vectors, dim=4, similarity="dot")
    export_embeddings(bundle, target)
    store = open_store(target)
    queries = torch.cat([torch.randint(-2, 3, (9, 4), generator=generator), torch.zeros(1, 4)])
    ids = bundle.item_ids.to_list()
    exclude = [[], ids[:1], ids[::2], ids, [*ids[3:], ids[4]], ["stranger", ids[9], ids[9]]]
    exclude += [ids[30:50]] * 4
    for k, left_out in itertools.product((1, 2, 7, 58, 59, 60, 75), (None, exclude)):
        found, scores = store.search(queries, k, exclude=left_out)
        assert scores.shape == (10, k)
        for query, items in enumerate(found):
            out = set() if left_out is None else set(left_out[query])
            expected, values = slow_search(bundle, queries[query].tolist(), k, out)
            assert items == expected
            assert scores[query].tolist() == values + [-torch.inf] * (k - len(values))


def test_search_for_nobody(target, make_bundle):
    export_embeddings(make_bundle(), target)
    store = open_store(target)
    for exclude in (None, []):
        found, scores = store.search(torch.empty(0, 6), 3, exclude=exclude)
        assert found == []
        assert scores.shape == (0, 3)


def test_searches_that_make_no_sense_are_refused(target, make_bundle):
    export_embeddings(make_bundle(), target)
    store = open_store(target)
    one = torch.ones(1, 6)
    for query, k in ((one, 0), (one[0], 1), (one[:, :5], 1)):
        with pytest.raises(ShapeError, match=r"expected queries \[Q, 6\] and k >= 1"):
            store.search(query, k)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ShapeError, match="not finite"):
            store.search(value * one, 1)
    with pytest.raises(ShapeError, match=r"float32, found torch\.float64"):
        store.search(one.double(), 1)
    with pytest.raises(ShapeError, match="expected 1 lists to exclude, found 2"):
        store.search(one, 1, exclude=[[], []])


def test_a_folder_that_was_moved_is_a_store_still(target, make_bundle):
    export_embeddings(make_bundle(), target)
    moved = Path(f"{folder_of(target)}-moved")
    shutil.move(folder_of(target), moved)
    assert holds(f"{parse_target(target).kind}:{moved}", make_bundle())
