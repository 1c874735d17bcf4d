import polars as pl
import polars.testing
import pytest
import torch
from torch.nn.functional import normalize

from recclr.data.interactions import Log
from recclr.data.prepare import prepare
from recclr.errors import ConfigError, DataError, StoreError
from recclr.export import ModelFacts, build_bundle, export_embeddings, open_store
from recclr.export import recommend_from_store as ask
from recclr.recommend import recommend
from recclr.settings import DataSettings, TowerSettings
from recclr.topk import EmbeddingRanker

KINDS = ("parquet", "lancedb")


@pytest.fixture(scope="module", params=["integer", "string"])
def world(request):
    """A prepared log of 120 users and 90 items, and vectors for all of them and for strangers."""
    generator = torch.Generator().manual_seed(5)
    pairs = torch.stack([torch.arange(2400) % 120, torch.randint(90, (2400,), generator=generator)])
    frame = pl.DataFrame({"user_id": pairs[0].numpy(), "item_id": pairs[1].numpy()})
    events = frame.with_columns(pl.all() + 2**53 + 1, timestamp=pl.int_range(2400) * 10)
    if request.param == "string":
        events = events.with_columns(pl.format("é{}", pl.col("user_id", "item_id")))
    log = Log(events, None, None, DataSettings(events="<memory>"))
    prepared = prepare(log, None, user=TowerSettings(), item=TowerSettings())
    users = normalize(torch.randn(len(prepared.users) + 1, 8, generator=generator))
    items = normalize(torch.randn(len(prepared.items), 8, generator=generator))
    return prepared, EmbeddingRanker("model", users, items), events


@pytest.fixture(scope="module")
def targets(world, tmp_path_factory):
    prepared, ranker, _ = world
    bundle = build_bundle(
        item_ids=prepared.items.ids,
        item_vectors=ranker.item_vectors,
        user_ids=prepared.users.ids,
        user_vectors=ranker.user_vectors[:-1],
        unknown_user_vector=ranker.user_vectors[-1],
        similarity="cosine",
        facts=ModelFacts("now"),
    )
    folder = tmp_path_factory.mktemp("stores")
    made = {kind: f"{kind}:{folder / kind}" for kind in KINDS}
    for target in made.values():
        export_embeddings(bundle, target)
    return made


@pytest.fixture(params=KINDS)
def target(request, targets):
    return targets[request.param]


def same(found, expected):
    assert found.schema == expected.schema
    pl.testing.assert_frame_equal(found.drop("score"), expected.drop("score"))
    assert (found["score"] - expected["score"]).abs().max() < 1e-6


@pytest.mark.parametrize("keep_seen", [False, True])
def test_a_store_recommends_what_the_trainer_does(world, target, keep_seen):
    prepared, ranker, events = world
    users = prepared.users.ids.sample(100, seed=1, shuffle=True)
    expected = recommend(prepared, ranker, users, k=7, keep_seen=keep_seen)
    assert expected.height == 700
    same(ask(target, users, 7, seen=None if keep_seen else events), expected)


def test_strangers_nulls_and_repeats(world, target):
    prepared, ranker, events = world
    known = prepared.users.ids
    stranger = 5 if known.dtype.is_integer() else "stranger"
    users = pl.Series("user_id", [known[4], None, stranger, known[2], known[4]], dtype=known.dtype)
    found = ask(target, users, 3, seen=events)
    same(found, recommend(prepared, ranker, users, k=3))
    assert found["user_id"].unique(maintain_order=True).to_list() == [known[4], stranger, known[2]]
    assert found["rank"].to_list() == [1, 2, 3] * 3


def test_fewer_rows_where_items_run_out(world, target):
    prepared, ranker, events = world
    users = prepared.users.ids[:3]
    left = [90 - events.filter(user_id=user)["item_id"].n_unique() for user in users]
    assert max(left) < 90
    found = ask(target, users, 1000, seen=events)
    assert found["user_id"].value_counts(sort=False).height == 3
    assert [found.filter(user_id=user).height for user in users] == left
    same(found, recommend(prepared, ranker, users, k=1000))


def test_what_to_leave_out_may_hold_anything_else_as_well(world, target):
    prepared, _, events = world
    user, everyone = prepared.users.ids[:1], prepared.users.ids[:4]
    best = ask(target, user, 3)["item_id"]
    text = not user.dtype.is_integer()
    seen = pl.DataFrame(
        {
            "other": [1, 2, 3, 4],
            "item_id": [best[0], "x" if text else 1, best[1], None],
            "user_id": [user[0], user[0], "x" if text else 1, user[0]],
        }
    )
    found = ask(target, everyone, 90, seen=seen)
    plain = ask(target, everyone, 90)
    assert found.height == plain.height - 1
    left_out = (pl.col("user_id") == user[0]) & (pl.col("item_id") == best[0])
    expected = plain.filter(~left_out)
    pairs = ["user_id", "item_id"]
    assert found.select(pairs).equals(expected.select(pairs))
    assert ask(target, user, 3, seen=events.clear())["item_id"].equals(best)


def test_no_users_give_no_rows_in_the_types_of_the_store(world, target):
    dtype = world[0].users.ids.dtype
    expected = {"user_id": dtype, "item_id": dtype, "rank": pl.Int32, "score": pl.Float32}
    for users in (
        pl.Series([], dtype=pl.Null),
        pl.Series([None, None]),
        pl.Series([], dtype=dtype),
    ):
        found = ask(target, users, 3, seen=world[2])
        assert found.schema == expected
        assert found.height == 0


def test_an_open_store_is_asked_without_opening_it_again(world, target):
    users = world[0].users.ids[:5]
    same(ask(open_store(target), users, 4), ask(target, users, 4))


def test_narrow_integers_are_looked_up_by_value(world, tmp_path):
    ids = pl.Series([7, 3], dtype=pl.Int64)
    bundle = build_bundle(
        item_ids=pl.Series([1, 2, 3], dtype=pl.UInt16),
        item_vectors=torch.eye(3),
        user_ids=ids,
        user_vectors=torch.eye(2, 3),
        unknown_user_vector=torch.tensor([0.0, 0.0, 1.0]),
        similarity="cosine",
        facts=ModelFacts("now"),
    )
    target = f"parquet:{tmp_path / 'p'}"
    export_embeddings(bundle, target)
    found = ask(target, pl.Series([3, 7, 9], dtype=pl.Int8), 1)
    assert found["user_id"].to_list() == [3, 7, 9]
    assert found["item_id"].to_list() == [2, 1, 3]
    assert found.schema["user_id"] == pl.Int8
    assert found.schema["item_id"] == pl.UInt16


def test_questions_that_make_no_sense_are_refused(world, target, tmp_path):
    users = world[0].users.ids[:2]
    other = pl.Series(["a"] if users.dtype.is_integer() else [1])
    with pytest.raises(ConfigError, match="k must be at least 1, found 0"):
        ask(target, users, 0)
    with pytest.raises(DataError, match="holds"):
        ask(target, other, 3)
    with pytest.raises(DataError, match="floats"):
        ask(target, pl.Series([1.5]), 3)
    with pytest.raises(DataError, match=r"columns user_id and item_id, found \['user_id'\]"):
        ask(target, users, 3, seen=pl.DataFrame({"user_id": users}))
    with pytest.raises(DataError, match="'item_id' to look up"):
        ask(target, users, 3, seen=pl.DataFrame({"user_id": users, "item_id": [*other, None]}))
    with pytest.raises(StoreError, match="named 'other'"):
        ask(f"lancedb:{tmp_path}", users, 3, name="other")
    with pytest.raises(ConfigError, match="expected KIND:DIR"):
        ask("store", users, 3)
