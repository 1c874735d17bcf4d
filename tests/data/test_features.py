import json

import numpy as np
import polars as pl
import pytest
import torch

from recclr.data.features import FeatureEncoder, count_missing, fit_encoders
from recclr.data.log import CategoricalColumn, DenseColumn, FeatureTable, RaggedColumn
from recclr.errors import CheckpointError, ConfigError, DataError
from recclr.settings import FeatureSettings, TowerSettings

NO_IDS = pl.Series([], dtype=pl.Int64)

ITEMS = pl.DataFrame(
    {
        "item_id": [10, 20, 30, 40, 50],
        "genres": [["a", "b"], ["b"], None, ["z"], []],
        "title": ["Die Hard", "Hard Candy", None, "Zulu", "!"],
        "year": [1988.0, 2005.0, None, 3000.0, 1999.0],
        "colour": ["red", "blue", "red", "zinc", None],
        "vector": [[1.0, 0.0], [0.0, 3.0], None, [9.0, 9.0], [0.5, 0.5]],
    }
)
ALL_KINDS = {
    "genres": FeatureSettings(kind="multi_hot"),
    "title": FeatureSettings(kind="text", buckets=101),
    "year": FeatureSettings(kind="numeric"),
    "rank": FeatureSettings(kind="numeric", column="year", transform="quantile"),
    "colour": FeatureSettings(kind="categorical"),
    "hashed": FeatureSettings(kind="categorical", column="colour", buckets=13),
    "recent": FeatureSettings(kind="statistics"),
    "vector": FeatureSettings(kind="vector"),
}


def tower(**features: FeatureSettings) -> TowerSettings:
    return TowerSettings(features=features)


def fit_items(frame: pl.DataFrame, ids: list[int], **features: FeatureSettings) -> FeatureEncoder:
    return fit_encoders(None, frame, TowerSettings(), tower(**features), NO_IDS, pl.Series(ids))[1]


def assert_same(first: FeatureTable, second: FeatureTable) -> None:
    assert first.num_rows == second.num_rows
    assert list(first.columns) == list(second.columns)
    for name, column in first.columns.items():
        other = second.columns[name]
        assert type(column) is type(other)
        if isinstance(column, CategoricalColumn):
            assert column.cardinality == other.cardinality
            assert torch.equal(column.idx, other.idx)
        elif isinstance(column, RaggedColumn):
            assert column.cardinality == other.cardinality
            assert torch.equal(column.csr.offsets, other.csr.offsets)
            assert torch.equal(column.csr.values, other.csr.values)
        else:
            assert torch.equal(column.values, other.values)


def test_every_kind_gives_its_column_in_the_order_of_the_settings() -> None:
    table = fit_items(ITEMS, [10, 20, 30], **ALL_KINDS).encode(ITEMS)
    assert table.num_rows == 5
    assert {name: type(column) for name, column in table.columns.items()} == {
        "genres": RaggedColumn,
        "title": RaggedColumn,
        "year": DenseColumn,
        "rank": DenseColumn,
        "colour": CategoricalColumn,
        "hashed": CategoricalColumn,
        "vector": DenseColumn,
    }
    assert list(table.columns) == [name for name in ALL_KINDS if name != "recent"]
    assert {name: count_missing(column) for name, column in table.columns.items()} == {
        "genres": 3,  # null, unknown and empty
        "title": 3,  # null, without a word, and without a term that train has
        "year": 1,
        "rank": 1,
        "colour": 2,
        "hashed": 1,
        "vector": 1,
    }


def test_nothing_is_learned_from_entities_outside_train() -> None:
    """The canary: only values of items 40 and 50 differ, and no item of train may notice."""
    canary = pl.DataFrame(
        {
            "item_id": [40, 50],
            "genres": [["canary", "b", "b"], ["canary"]],
            "title": ["canary canary", None],
            "year": [-1e9, 1e9],
            "colour": ["canary", "blue"],
            "vector": [[500.0, 1.0], None],
        }
    )
    other = pl.concat([ITEMS.head(3), canary])
    # Train ids that the table lacks (60) are no reason to look at others.
    plain = fit_items(ITEMS, [30, 10, 10, 20, 60], **ALL_KINDS)
    planted = fit_items(other, [10, 20, 30, 60], **ALL_KINDS)
    assert json.dumps(plain.to_json()) == json.dumps(planted.to_json())
    assert "canary" not in json.dumps(planted.to_json())
    assert_same(plain.encode(ITEMS.head(3)), planted.encode(other.head(3)))
    # The same canary within train is noticed, so that the test above can fail.
    noticed = fit_items(other, [10, 20, 30, 40, 50], **ALL_KINDS)
    for name in ("genres", "year", "rank", "colour", "vector"):
        assert noticed.columns[name].to_json() != plain.columns[name].to_json()


def test_json_round_trip_encodes_new_rows_identically() -> None:
    encoder = fit_items(ITEMS, [10, 20, 30], **ALL_KINDS)
    back = FeatureEncoder.from_json(json.loads(json.dumps(encoder.to_json())))
    assert back.side == "item"
    assert back.to_json() == encoder.to_json()
    new = pl.DataFrame(
        {
            "item_id": ["other", "type"],
            "genres": [["b", "q"], ["a"]],
            "title": ["Hard", "Candy!"],
            "year": [2001, 1901],
            "colour": [None, "blue"],
            "vector": [[0.0, 1.0], [2.0, 2.0]],
        }
    )
    assert_same(back.encode(new), encoder.encode(new))
    assert_same(back.encode(ITEMS), encoder.encode(ITEMS))


def test_rows_pick_entities_and_minus_one_is_all_missing() -> None:
    encoder = fit_items(ITEMS, [10, 20, 30], **ALL_KINDS)
    table = encoder.encode(ITEMS, np.array([1, -1, 0, 1]))
    assert table.num_rows == 4
    whole = encoder.encode(ITEMS)
    assert table.columns["colour"].idx.tolist() == [
        whole.columns["colour"].idx[1],
        0,
        whole.columns["colour"].idx[0],
        whole.columns["colour"].idx[1],
    ]
    for column in table.columns.values():
        assert count_missing(column) == 1
    assert table.columns["year"].values[1].tolist() == [0, 1]


def test_errors_name_the_row_of_the_table() -> None:
    broken = ITEMS.with_columns(
        pl.Series("vector", [[1.0, 0.0], [0.0, 3.0], None, [1.0], [0.5, 0.5]])
    )
    encoder = fit_items(broken, [10, 20], vector=FeatureSettings(kind="vector"))
    with pytest.raises(DataError, match=r"item\.features\.vector.*\(first rows 3\)"):
        encoder.encode(broken, np.array([4, 3, 2, 1, 0]))


def test_a_shared_table_has_one_vocabulary_over_both_towers() -> None:
    users = pl.DataFrame({"user_id": [1, 2, 3], "country": ["FR", "DE", "cold"]})
    items = pl.DataFrame({"item_id": [7, 8], "made_in": [["IT", "FR"], ["FR"]], "own": ["x", "y"]})
    shared = {"shared": "country", "min_count": 1}
    user_encoder, item_encoder = fit_encoders(
        users,
        items,
        tower(country=FeatureSettings(kind="categorical", **shared)),
        tower(
            origin=FeatureSettings(kind="multi_hot", column="made_in", **shared),
            own=FeatureSettings(kind="categorical"),
        ),
        pl.Series([1, 2]),
        pl.Series([7, 8]),
    )
    country = user_encoder.encode(users).columns["country"]
    origin = item_encoder.encode(items).columns["origin"]
    assert country.idx.tolist() == [1, 2, 0]  # FR (3 rows), DE, and no train user
    assert [origin.csr.row(i).tolist() for i in range(2)] == [[1, 3], [1]]
    assert country.cardinality == origin.cardinality == 4
    assert item_encoder.encode(items).columns["own"].cardinality == 3


TITLES = pl.DataFrame(
    {"item_id": [1, 2, 3, 4], "title": ["red mug", "red cup", "red tin", "mug cup of jade"]}
)


def lengths(encoder: FeatureEncoder, name: str = "title") -> list[int]:
    return encoder.encode(TITLES).columns[name].csr.lengths().tolist()


def test_terms_of_a_text_that_train_lacks_are_left_out() -> None:
    """Nothing has taught their vectors; of rare ones likewise, where min_count says so."""
    title = {"kind": "text", "buckets": 1 << 20}
    every = lengths(fit_items(TITLES, [1, 2, 3, 4], title=FeatureSettings(**title)))
    train = [1, 2, 3]
    known = fit_items(TITLES, train, title=FeatureSettings(**title))
    # Of item 4 the words mug and cup are left, and their three grams each: <mu mug ug> <cu cup up>.
    assert lengths(known) == [*every[:3], 8]
    frequent = fit_items(TITLES, train, title=FeatureSettings(min_count=2, **title))
    # All three have red and its grams.
    assert lengths(frequent) == [4, 4, 4, 0]
    back = FeatureEncoder.from_json(json.loads(json.dumps(frequent.to_json())))
    assert lengths(back) == [4, 4, 4, 0]


def test_vectors_that_more_than_the_log_teaches_know_the_whole_table() -> None:
    features = tower(title=FeatureSettings(kind="text", buckets=1 << 20))
    ids = pl.Series([1, 2, 3])
    whole = fit_encoders(None, TITLES, TowerSettings(), features, NO_IDS, ids, whole_tables=True)[1]
    every = fit_items(TITLES, [1, 2, 3, 4], title=FeatureSettings(kind="text", buckets=1 << 20))
    assert lengths(whole) == lengths(every)


def test_texts_that_share_a_table_count_their_terms_together() -> None:
    settings = {"kind": "text", "buckets": 1 << 20, "shared": "words", "min_count": 2}
    frame = TITLES.with_columns(pl.Series("note", ["mug", None, None, "jade"]))
    features = tower(title=FeatureSettings(**settings), note=FeatureSettings(**settings))
    _, encoder = fit_encoders(None, frame, TowerSettings(), features, NO_IDS, pl.Series([1, 2]))
    table = encoder.encode(frame)
    # red twice in titles; mug once in each column.
    assert table.columns["title"].csr.lengths().tolist() == [8, 4, 4, 4]
    assert table.columns["note"].csr.lengths().tolist() == [4, 0, 0, 0]


def test_a_run_without_a_list_of_known_terms_knows_all() -> None:
    """As written before there was one."""
    encoder = fit_items(TITLES, [1], title=FeatureSettings(kind="text", buckets=1 << 20))
    told = json.loads(json.dumps(encoder.to_json()))
    del told["columns"]["title"]["known"]
    every = fit_items(TITLES, [1, 2, 3, 4], title=FeatureSettings(kind="text", buckets=1 << 20))
    assert lengths(FeatureEncoder.from_json(told)) == lengths(every)
    told["columns"]["title"]["known"] = "ff"
    with pytest.raises(CheckpointError, match="damaged"):
        FeatureEncoder.from_json(told)


def test_a_shared_hash_space_gives_equal_buckets() -> None:
    users = pl.DataFrame({"user_id": [1], "tag": ["late"]})
    items = pl.DataFrame({"item_id": [7], "tags": [["late", "early"]]})
    features = {"buckets": 1009, "shared": "tags"}
    user_encoder, item_encoder = fit_encoders(
        users,
        items,
        tower(tag=FeatureSettings(kind="categorical", **features)),
        tower(tags=FeatureSettings(kind="multi_hot", **features)),
        pl.Series([1]),
        pl.Series([7]),
    )
    bucket = int(user_encoder.encode(users).columns["tag"].idx[0])
    assert bucket in item_encoder.encode(items).columns["tags"].csr.values.tolist()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"kind": "categorical"}, {"kind": "categorical", "buckets": 9}),
        ({"kind": "categorical", "buckets": 8}, {"kind": "multi_hot", "buckets": 9}),
        ({"kind": "categorical", "min_count": 2}, {"kind": "categorical"}),
        ({"kind": "categorical", "buckets": 9}, {"kind": "text", "buckets": 9}),
    ],
)
def test_a_shared_table_needs_equal_settings(first: dict, second: dict) -> None:
    features = {
        "one": FeatureSettings(column="colour", shared="s", **first),
        "two": FeatureSettings(column="colour", shared="s", **second),
    }
    with pytest.raises(ConfigError, match=r"item\.features\.two and item\.features\.one share"):
        fit_items(ITEMS, [10], **features)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "numeric", "shared": "s"},
        {"kind": "numeric", "buckets": 8},
        {"kind": "vector", "min_count": 2},
        {"kind": "categorical", "buckets": 8, "min_count": 2},
    ],
)
def test_settings_without_effect_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=r"item\.features\.year"):
        fit_items(ITEMS, [10], year=FeatureSettings(**settings))


def test_a_missing_column_names_the_closest() -> None:
    with pytest.raises(
        DataError, match=r"no column 'Genre' \(from item\.features\.tags\).*mean 'genres'\?"
    ):
        fit_items(ITEMS, [10], tags=FeatureSettings(kind="multi_hot", column="Genre"))
    encoder = fit_items(ITEMS, [10], year=FeatureSettings(kind="numeric"))
    with pytest.raises(DataError, match="no column 'year'"):
        encoder.encode(ITEMS.drop("year"))


def test_a_missing_table_names_the_setting() -> None:
    features = tower(age=FeatureSettings(kind="numeric"))
    with pytest.raises(
        ConfigError, match=r"user\.features\.age needs the users table.*data\.users"
    ):
        fit_encoders(None, ITEMS, features, TowerSettings(), NO_IDS, pl.Series([10]))


@pytest.mark.parametrize(
    ("kind", "column", "dtype"),
    [
        ("numeric", "title", "String"),
        ("text", "year", "Float64"),
        ("vector", "genres", r"List\(String\)"),
        ("categorical", "genres", r"List\(String\)"),
        ("multi_hot", "vector", "floats that are not whole"),
    ],
)
def test_a_wrong_type_names_column_kind_and_type(kind: str, column: str, dtype: str) -> None:
    settings = FeatureSettings(kind=kind, column=column, buckets=8 if kind == "text" else None)
    with pytest.raises(DataError, match=rf"column '{column}' \(item\.features\.f, kind '{kind}'\)"):
        fit_items(ITEMS, [10, 50], f=settings).encode(ITEMS)
    with pytest.raises(DataError, match=dtype):
        fit_items(ITEMS, [10, 50], f=settings).encode(ITEMS)


def test_no_features_need_no_table() -> None:
    users, items = fit_encoders(None, None, TowerSettings(), TowerSettings(), NO_IDS, NO_IDS)
    assert users.encode(None, np.full(3, -1)).num_rows == 3
    assert items.encode(None).num_rows == 0


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"side": "item", "columns": [1]},
        {"side": "item", "columns": {"x": {"kind": "os.system", "column": "c"}}},
        {"side": "item", "columns": {"x": {"kind": "numeric", "column": "c", "mean": "a"}}},
        {"side": "item", "columns": {"x": {"kind": "categorical", "column": "c"}}},
        {
            "side": "item",
            "columns": {"x": {"kind": "categorical", "column": "c", "categories": ["a", "a"]}},
        },
    ],
)
def test_a_damaged_description_is_refused(damaged: dict) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        FeatureEncoder.from_json(damaged)
