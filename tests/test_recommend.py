"""Rankings as tables in the caller's ids, against a sort of the score matrix by hand."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

import recclr.recommend as recommend_module
from recclr.baselines.popularity import PopularityRanker
from recclr.data.interactions import Log
from recclr.data.prepare import prepare
from recclr.errors import ConfigError, DataError
from recclr.recommend import recommend, similar
from recclr.settings import DataSettings, TowerSettings
from recclr.similarity import as_candidates
from recclr.topk import EmbeddingRanker

USERS = [7, 5, 11, 13]
ITEMS = ["fig", "kiwi", "pear", "date", "plum"]
HISTORIES = {7: ["fig", "kiwi"], 5: ["pear"], 11: ["fig"]}
# A row per user and one for strangers, a column per item.
SCORES = torch.tensor(
    [[9.0, 8, 1, 3, 2], [0, 1, 5, 2, 2], [4, 3, 2, 1, 0], [0, 5, 0, 0, 0], [0, 0, 0, 6, 7]]
)


def prepared_log(as_text):
    """Five items, of which two are in the catalogue only; one user in the table only."""
    text = "{}".format if as_text else int
    numbers = {item: 10 * place for place, item in enumerate(ITEMS)}
    item = str if as_text else numbers.get
    events = pl.DataFrame(
        [(text(user), item(name)) for user, names in HISTORIES.items() for name in names],
        schema=["user_id", "item_id"],
        orient="row",
    )
    items = pl.DataFrame({"item_id": [item(name) for name in ITEMS]})
    users = pl.DataFrame({"user_id": [text(user) for user in USERS]})
    log = Log(events, users, items, DataSettings(events="<memory>"))
    # Indices follow the first appearance in train, then the tables.
    prepared = prepare(log, None, user=TowerSettings(), item=TowerSettings())
    assert prepared.items.ids.to_list() == [item(name) for name in ITEMS]
    assert prepared.users.ids.to_list() == [text(user) for user in USERS]
    return prepared


@pytest.fixture(params=[True, False], ids=["text", "integers"])
def prepared(request):
    return prepared_log(request.param)


@pytest.fixture
def ranker():
    return EmbeddingRanker("planted", SCORES, torch.eye(len(ITEMS)))


def ids_of(prepared, side, *values):
    """Ids of users by number, or of items by name, as this log spells them."""
    as_text = prepared.items.ids.dtype == pl.String
    if side == "user":
        return pl.Series("ids", [str(v) if as_text else v for v in values])
    return pl.Series("ids", [v if as_text else 10 * ITEMS.index(v) for v in values])


def told(prepared, table):
    """{user: [(item name, rank, score), …]} of a table."""
    names = dict(zip(prepared.items.ids, ITEMS, strict=True))
    found = {}
    for user, item, rank, score in table.rows():
        found.setdefault(int(user), []).append((names[item], rank, score))
    return found


def test_every_user_of_train_gets_the_best_items_they_do_not_have(prepared, ranker):
    table = recommend(prepared, ranker, k=3)
    assert told(prepared, table) == {
        7: [("date", 1, 3.0), ("plum", 2, 2.0), ("pear", 3, 1.0)],
        5: [("date", 1, 2.0), ("plum", 2, 2.0), ("kiwi", 3, 1.0)],
        11: [("kiwi", 1, 3.0), ("pear", 2, 2.0), ("date", 3, 1.0)],
    }
    assert table.schema == {
        "user_id": prepared.users.ids.dtype,
        "item_id": prepared.items.ids.dtype,
        "rank": pl.Int32,
        "score": pl.Float32,
    }


def test_seen_items_are_kept_on_request(prepared, ranker):
    table = recommend(prepared, ranker, ids_of(prepared, "user", 7), k=2, keep_seen=True)
    assert told(prepared, table) == {7: [("fig", 1, 9.0), ("kiwi", 2, 8.0)]}


def test_users_are_answered_once_in_order_of_first_appearance(prepared, ranker):
    users = ids_of(prepared, "user", 11, 7, 11, 5, 7)
    table = recommend(prepared, ranker, users, k=1)
    assert [int(user) for user in table["user_id"]] == [11, 7, 5]


def test_unknown_users_get_the_ranking_of_an_empty_history(prepared, ranker):
    table = recommend(prepared, ranker, ids_of(prepared, "user", 404, 5, 405), k=2)
    found = told(prepared, table)
    assert list(found) == [404, 5, 405]
    assert found[404] == found[405] == [("plum", 1, 7.0), ("date", 2, 6.0)]


def test_users_of_the_table_alone_are_answered_when_asked_for(prepared, ranker):
    table = recommend(prepared, ranker, ids_of(prepared, "user", 13), k=1)
    assert told(prepared, table) == {13: [("kiwi", 1, 5.0)]}
    assert 13 not in told(prepared, recommend(prepared, ranker, k=1))


def test_a_subset_is_ranked_alone(prepared, ranker):
    items = ids_of(prepared, "item", "kiwi", "plum", "fig", "plum")
    table = recommend(prepared, ranker, ids_of(prepared, "user", 7, 5), k=9, items=items)
    assert told(prepared, table) == {
        7: [("plum", 1, 2.0)],
        5: [("plum", 1, 2.0), ("kiwi", 2, 1.0), ("fig", 3, 0.0)],
    }


def test_fewer_rows_where_the_candidates_run_out(prepared, ranker):
    table = recommend(prepared, ranker, k=10**9)
    assert table.height == sum(len(ITEMS) - len(had) for had in HISTORIES.values())
    only_seen = ids_of(prepared, "item", "pear")
    nothing = recommend(prepared, ranker, ids_of(prepared, "user", 5), k=3, items=only_seen)
    assert nothing.height == 0
    assert nothing.schema == table.schema


@pytest.mark.parametrize("dtype", [None, pl.Null, "own"])
def test_no_users_give_an_empty_table_of_the_same_types(prepared, ranker, dtype):
    own = prepared.users.ids.dtype
    users = pl.Series("ids", [], dtype=own if dtype == "own" else dtype)
    table = recommend(prepared, ranker, users, k=3)
    assert table.height == 0
    assert table.schema == recommend(prepared, ranker, k=3).schema
    gone = pl.Series("ids", [None], dtype=own)
    assert_frame_equal(recommend(prepared, ranker, gone, k=3), table)


def test_blocks_of_users_do_not_change_the_table(prepared, ranker, monkeypatch):
    users = ids_of(prepared, "user", 5, 404, 7, 11)
    whole = recommend(prepared, ranker, users, k=3)
    monkeypatch.setattr(recommend_module, "_USERS", 3)
    assert_frame_equal(recommend(prepared, ranker, users, k=3), whole)


def test_any_ranker_will_do(prepared):
    ranker = PopularityRanker("popularity", torch.tensor([5.0, 4, 3, 2, 1]))
    found = told(prepared, recommend(prepared, ranker, k=2))
    assert {user: [name for name, *_ in rows] for user, rows in found.items()} == {
        7: ["pear", "date"],
        5: ["fig", "kiwi"],
        11: ["kiwi", "pear"],
    }


def test_unknown_items_are_named(prepared, ranker):
    known = ids_of(prepared, "item", "fig")
    other = "rock" if known.dtype == pl.String else 4711
    items = pl.Series([known[0], other])
    expected = rf"1 of 2 item ids are not known.*{other}.*it knows 5"
    with pytest.raises(DataError, match=expected):
        recommend(prepared, ranker, items=items)
    with pytest.raises(DataError, match=expected):
        similar(prepared, ranker, items)


def test_ids_of_another_type_are_refused(prepared, ranker):
    wrong = pl.Series("ids", [7] if prepared.users.ids.dtype == pl.String else ["7"])
    for call in (
        lambda: recommend(prepared, ranker, wrong),
        lambda: recommend(prepared, ranker, items=wrong),
        lambda: similar(prepared, ranker, wrong),
    ):
        with pytest.raises(DataError, match="type"):
            call()


def test_k_below_1_is_refused(prepared, ranker):
    with pytest.raises(ConfigError, match="at least 1, found 0"):
        recommend(prepared, ranker, k=0)
    with pytest.raises(ConfigError, match="at least 1, found -1"):
        similar(prepared, ranker, k=-1)


VECTORS = np.array([[2, 0, 0], [3, 4, 0], [0, 0, -1], [-5, 1, 0], [1, 1, 1]], dtype=np.float32)


def cosine_neighbours(place, k):
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    cosines = unit @ unit[place]
    order = [p for p in np.argsort(-cosines, kind="stable") if p != place][:k]
    return [(ITEMS[p], rank, pytest.approx(cosines[p])) for rank, p in enumerate(order, 1)]


def similar_told(prepared, table):
    names = dict(zip(prepared.items.ids, ITEMS, strict=True))
    found = {}
    for item, other, rank, score in table.rows():
        found.setdefault(names[item], []).append((names[other], rank, score))
    return found


@pytest.fixture
def by_vectors():
    return EmbeddingRanker("planted", torch.zeros(5, 3), torch.from_numpy(VECTORS))


def test_similar_items_point_the_same_way(prepared, by_vectors):
    table = similar(prepared, by_vectors, k=2)
    assert table.columns == ["item_id", "similar_id", "rank", "score"]
    assert similar_told(prepared, table) == {
        name: cosine_neighbours(place, 2) for place, name in enumerate(ITEMS)
    }


def test_similar_items_are_looked_up_once_and_never_the_item_itself(prepared, by_vectors):
    items = ids_of(prepared, "item", "plum", "fig", "plum")
    found = similar_told(prepared, similar(prepared, by_vectors, items, k=10**9))
    assert list(found) == ["plum", "fig"]
    assert found == {name: cosine_neighbours(ITEMS.index(name), 4) for name in found}


def test_similar_to_nothing(prepared, by_vectors):
    nothing = similar(prepared, by_vectors, pl.Series("ids", [], dtype=pl.Null))
    assert nothing.height == 0
    assert nothing.schema == similar(prepared, by_vectors).schema


def test_similar_items_are_the_nearest_under_euclidean_similarity(prepared):
    vectors = torch.from_numpy(VECTORS)
    # The two coordinates of the lift, and one of a bias, which says nothing of two items.
    bias = torch.tensor([[9.0], [-9], [0], [99], [1]])
    served = torch.cat([as_candidates(vectors, "euclidean"), bias], 1)
    ranker = EmbeddingRanker(
        "planted", torch.zeros(5, 6), served, similarity="euclidean", num_beside=3
    )
    squares = (vectors[:, None] - vectors).square().sum(2).fill_diagonal_(math.inf)
    expected = {
        ITEMS[place]: [
            (ITEMS[int(other)], rank, pytest.approx(-float(squares[place, other])))
            for rank, other in enumerate(squares[place].argsort()[:2], 1)
        ]
        for place in range(5)
    }
    assert similar_told(prepared, similar(prepared, ranker, k=2)) == expected


def test_a_bias_of_items_is_not_what_makes_them_similar(prepared, by_vectors):
    served = torch.cat([torch.from_numpy(VECTORS), torch.tensor([[9.0], [-9], [0], [99], [1]])], 1)
    biased = EmbeddingRanker("planted", torch.zeros(5, 4), served, num_beside=1)
    assert_frame_equal(similar(prepared, biased), similar(prepared, by_vectors))
