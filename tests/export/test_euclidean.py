"""Euclidean similarity, and a bias of items, from the towers to a store's answers."""

import polars as pl
import polars.testing
import pytest
import torch

from recclr.config import parse_config
from recclr.data.interactions import Log
from recclr.data.prepare import prepare
from recclr.export import open_store
from recclr.export import recommend_from_store as ask
from recclr.load import fresh_model, ranker_of
from recclr.recommend import recommend
from recclr.settings import DataSettings, TowerSettings
from recclr.shipping import ship
from recclr.similarity import log_popularity

NUM_USERS, NUM_ITEMS, DIM = 23, 41, 6


@pytest.fixture(scope="module")
def prepared():
    draws = torch.Generator().manual_seed(5)
    users = torch.arange(300) % NUM_USERS
    popular = torch.randint(7, (300 - NUM_ITEMS,), generator=draws)
    items = torch.cat([torch.arange(NUM_ITEMS), popular])
    events = pl.DataFrame({"user_id": users.numpy(), "item_id": items.numpy()})
    events = events.with_columns(timestamp=pl.int_range(300) * 10)
    log = Log(events, None, None, DataSettings(events="<memory>"))
    return prepare(log, None, user=TowerSettings(), item=TowerSettings())


@pytest.mark.parametrize("kind", ["parquet", "lancedb"])
@pytest.mark.parametrize(
    ("similarity", "bias", "told"),
    [
        ("euclidean", 0.0, "euclidean"),
        ("euclidean", 0.2, "dot"),
        ("cosine", 0.2, "dot"),
        ("cosine", 0.0, "cosine"),
    ],
)
def test_a_store_answers_as_the_towers_would(prepared, tmp_path, kind, similarity, bias, told):
    model = {"embedding_dim": DIM, "similarity": similarity, "popularity_bias": bias}
    config = parse_config({"data": {"events": "e"}, "model": model})
    trained = fresh_model(config, prepared.tensors).eval()
    ranker = ranker_of(trained, None)
    report = ship(prepared, ranker, f"{kind}:{tmp_path / 'v'}", run=None, config=config)
    beside = 2 * (similarity == "euclidean") + (bias != 0)
    assert report.embedding_dim == DIM + beside
    store = open_store(f"{kind}:{tmp_path / 'v'}")
    assert store.manifest.similarity == told
    assert store.manifest.to_json()["metric"] == "dot"

    # From the tables of ids, which are these towers' whole output.
    with torch.no_grad():
        users, items = (
            tower.parts[0].table.weight[1:].double()
            for tower in (trained.user_tower, trained.item_tower)
        )
    if similarity == "euclidean":
        scores = -(users[:, None] - items).square().sum(2)
    else:
        scores = torch.cosine_similarity(users[:, None], items, dim=2)
    scores = scores + bias * log_popularity(prepared.tensors.train.item_counts())
    best = scores.sort(descending=True)
    asked = prepared.users.ids
    found = ask(store, asked, 5)
    expected = prepared.items.decode(best.indices[:, :5].flatten().numpy())
    assert found["item_id"].to_list() == expected.to_list()
    values = best.values[:, :5].flatten().tolist()
    assert found["score"].to_list() == pytest.approx(values, abs=1e-5)
    ours = recommend(prepared, ranker, asked, k=5, keep_seen=True)
    pl.testing.assert_frame_equal(ours, found, abs_tol=1e-5)
    if similarity == "euclidean":
        assert torch.equal(store.read_vectors("item")[:, :DIM], items.float())
        assert torch.equal(store.read_vectors("user")[:, :DIM] / 2, users.float())
