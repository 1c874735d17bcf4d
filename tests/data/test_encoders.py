import json
import logging

import numpy as np
import polars as pl
import pytest

from recclr.data.column import Column
from recclr.data.encoders import CategoryEncoder, CategorySpace, MultiHotEncoder, TextEncoder
from recclr.data.text import hash_buckets
from recclr.errors import DataError


def column(values: pl.Series, kind: str) -> Column:
    return Column(values, values.name, "item.features.f", kind)


def category(train: pl.Series, min_count: int = 1) -> CategoryEncoder:
    space = CategorySpace.fit([column(train, "categorical")], min_count=min_count)
    return CategoryEncoder(train.name, space)


def tags(train: pl.Series, min_count: int = 1) -> MultiHotEncoder:
    space = CategorySpace.fit([column(train, "multi_hot")], min_count=min_count)
    return MultiHotEncoder(train.name, space)


def test_categories_by_frequency_then_text() -> None:
    encoder = category(pl.Series("c", ["b", "z", "a", "z", None, "b", "z"]))
    encoded = encoder.encode(column(pl.Series("c", ["a", "z", "b", "new", None]), "categorical"))
    assert encoded.idx.tolist() == [3, 1, 2, 0, 0]
    assert encoded.cardinality == 4


def test_the_order_of_rows_changes_nothing() -> None:
    values = ["q", "d", "d", "m", "q", "a"]
    forward, backward = category(pl.Series("c", values)), category(pl.Series("c", values[::-1]))
    assert forward.to_json() == backward.to_json()


def test_rare_categories_are_unknown() -> None:
    encoder = category(pl.Series("c", ["x", "y", "x", "w", "y", "x"]), min_count=2)
    encoded = encoder.encode(column(pl.Series("c", ["w", "x", "y"]), "categorical"))
    assert (encoded.idx.tolist(), encoded.cardinality) == ([0, 1, 2], 3)


@pytest.mark.parametrize(
    "later",
    [
        pl.Series("c", [3, 12, None], dtype=pl.UInt8),
        pl.Series("c", [3.0, 12.0, float("nan")]),
        pl.Series("c", ["3", "12", None]),
        pl.Series("c", ["3", "12", None], dtype=pl.Categorical),
    ],
)
def test_integers_mean_the_same_in_every_width_and_dress(later: pl.Series) -> None:
    encoder = category(pl.Series("c", [12, 3, 12], dtype=pl.Int64))
    assert encoder.encode(column(later, "categorical")).idx.tolist() == [2, 1, 0]


def test_booleans_and_all_null_columns() -> None:
    encoder = category(pl.Series("c", [True, False, True]))
    encoded = encoder.encode(column(pl.Series("c", [False, None, True]), "categorical"))
    assert encoded.idx.tolist() == [2, 0, 1]
    empty = category(pl.Series("c", [None, None]))
    assert empty.encode(column(pl.Series("c", [None, "a"]), "categorical")).idx.tolist() == [0, 0]


def test_types_that_are_no_categories_are_refused() -> None:
    for values in (pl.Series("c", [["a"]]), pl.Series("c", [b"a"])):
        with pytest.raises(DataError, match=r"items table: column 'c' .*'categorical'.*holds"):
            category(values)
    for value in (0.5, float("inf"), 2.0**60):
        with pytest.raises(DataError, match=r"not whole.*numeric"):
            category(pl.Series("c", [1.0, value]))


def test_one_category_per_row_unasked_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("recclr.data.encoders.MAX_CATEGORIES", 4)
    five = pl.Series("c", ["a", "b", "c", "d", "e", "a"])
    with pytest.raises(DataError, match=r"5 categories.*buckets.*min_count"):
        category(five)
    assert category(five, min_count=2).space.cardinality == 2


def test_hashed_categories_leave_bucket_0_to_the_missing() -> None:
    texts = [f"tag {number}" for number in range(500)]
    encoder = CategoryEncoder("c", CategorySpace.hashed(7))
    encoded = encoder.encode(column(pl.Series("c", [*texts, None]), "categorical"))
    slow = [1 + int(hash_buckets(pl.Series([text]), 6)[0]) for text in texts]
    assert encoded.idx.tolist() == [*slow, 0]
    assert set(slow) == {1, 2, 3, 4, 5, 6}
    assert encoded.cardinality == 7
    # With two buckets there is one for all categories.
    two = CategorySpace.hashed(2).encode(pl.Series(["a", "b", None]))
    assert two.tolist() == [1, 1, 0]


LISTS = [["b", "a"], None, ["a", None, "a"], [], ["c", "a", "b"]]


def slow_lists(train: list, later: list) -> list[list[int]]:
    counts: dict[str, int] = {}
    for row in train:
        for tag in set(row or ()) - {None}:
            counts[tag] = counts.get(tag, 0) + 1
    order = sorted(counts, key=lambda tag: (-counts[tag], tag))
    return [sorted({order.index(tag) + 1 for tag in row or () if tag in order}) for row in later]


@pytest.mark.parametrize("dtype", [pl.List(pl.String), pl.List(pl.Categorical)])
def test_multi_hot_equals_a_slow_loop(dtype: pl.DataType) -> None:
    later = [["c", "new", "b"], ["new"], None, ["a", "c", "a", None]]
    encoder = tags(pl.Series("g", LISTS, dtype=dtype))
    encoded = encoder.encode(column(pl.Series("g", later), "multi_hot"))
    rows = [encoded.csr.row(index).tolist() for index in range(4)]
    assert rows == slow_lists(LISTS, later) == [[2, 3], [], [], [1, 3]]
    assert encoded.cardinality == 4


def test_a_tag_counts_once_per_row() -> None:
    encoder = tags(pl.Series("g", [["x", "x", "x"], ["y"], ["y"]]), min_count=2)
    assert encoder.space.cardinality == 2
    assert encoder.to_json()["categories"] == ["y"]


def test_arrays_and_plain_values_are_lists() -> None:
    encoder = tags(pl.Series("g", [[5, 6], [6, 7]], dtype=pl.Array(pl.Int16, 2)))
    plain = encoder.encode(column(pl.Series("g", [7, None, 6, 8]), "multi_hot"))
    assert [plain.csr.row(i).tolist() for i in range(4)] == [[3], [], [1], []]


def test_joined_lists_are_pointed_out(caplog) -> None:
    values = pl.Series("genres", ["Action|Comedy", "Drama", None])
    with caplog.at_level(logging.WARNING):
        tags(values).encode(column(values, "multi_hot"))
    assert "str.split" in caplog.text
    assert "'genres'" in caplog.text
    caplog.clear()
    tags(pl.Series("g", ["a", "b"])).encode(column(pl.Series("g", ["a"]), "multi_hot"))
    assert caplog.text == ""


def test_lists_of_lists_and_of_fractions_are_refused() -> None:
    with pytest.raises(DataError, match="lists of strings"):
        tags(pl.Series("g", [[["a"]]]))
    with pytest.raises(DataError, match="not whole"):
        tags(pl.Series("g", [[0.5]]))


def test_text_takes_strings_only() -> None:
    encoder = TextEncoder("t", 64)
    missing = encoder.encode(column(pl.Series("t", [None, None]), "text"))
    assert missing.csr.lengths().tolist() == [0, 0]
    assert missing.cardinality == 64
    with pytest.raises(DataError, match=r"'t' .*'text'.* holds Int64; expected strings"):
        encoder.encode(column(pl.Series("t", [1]), "text"))


@pytest.mark.parametrize(
    ("encoder", "values"),
    [
        (category(pl.Series("c", ["é", "b"])), pl.Series("c", ["b", "é", "?"])),
        (CategoryEncoder("c", CategorySpace.hashed(9)), pl.Series("c", ["b", "é", None])),
        (tags(pl.Series("c", LISTS)), pl.Series("c", LISTS)),
        (TextEncoder("c", 33), pl.Series("c", ["A b", None])),
        (TextEncoder("c", 33, np.arange(33) % 2 == 0), pl.Series("c", ["A b c d e", None])),
    ],
)
def test_json_round_trip(encoder, values: pl.Series) -> None:
    back = type(encoder).from_json(json.loads(json.dumps(encoder.to_json())))
    first = encoder.encode(column(values, encoder.kind))
    second = back.encode(column(values, encoder.kind))
    assert first.cardinality == second.cardinality
    if isinstance(encoder, CategoryEncoder):
        assert first.idx.tolist() == second.idx.tolist()
    else:
        assert first.csr.offsets.tolist() == second.csr.offsets.tolist()
        assert first.csr.values.tolist() == second.csr.values.tolist()
