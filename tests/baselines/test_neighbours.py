"""Item-kNN against its formula with dense matrices."""

import numpy as np
import pytest
import torch

import recclr.baselines.neighbours as neighbours_module
from recclr.baselines.neighbours import item_knn
from recclr.baselines.popularity import popularity


def densely(prepared, *, neighbours, shrink, norm, half_life_d=None):
    """float64 [num_users, num_items] from loops over users and pairs of items."""
    log = prepared.train
    had = np.zeros((log.num_users, log.num_items))
    recent = np.zeros_like(had)
    for row in range(len(log)):
        user, item = int(log.user_idx[row]), int(log.item_idx[row])
        had[user, item] = 1
        if half_life_d is not None:
            age_d = (prepared.cutoff - int(log.timestamp[row])) / 86_400
            recent[user, item] += 0.5 ** (age_d / half_life_d)
    if half_life_d is None:
        recent = had
    similarity = np.zeros((log.num_items, log.num_items))
    for i in range(log.num_items):
        for j in range(log.num_items):
            together = sum(recent[user, j] for user in range(log.num_users) if had[user, i])
            if i != j and together:
                size = np.sqrt(had[:, i].sum()) * recent[:, j].sum() ** norm
                similarity[i, j] = together / (size + shrink)
        # Float32, as ours, so that equal similarities are equal here too.
        order = np.argsort(-similarity[i].astype(np.float32), kind="stable")
        similarity[i, order[neighbours:]] = 0
    return had @ similarity


CASES = [
    {"neighbours": 100, "shrink": 0.0, "norm": 0.5},
    {"neighbours": 3, "shrink": 7.0, "norm": 0.3},
    {"neighbours": 4, "shrink": 0.0, "norm": 0.0, "half_life_d": 5.0},
    {"neighbours": 100, "shrink": 2.0, "norm": 0.5, "half_life_d": 25.0},
]


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("block", [3, 2048])
def test_equals_the_formula(random_prepared, settings, block, monkeypatch):
    monkeypatch.setattr(neighbours_module, "_ITEMS", block)
    prepared = random_prepared(2)
    fallback = popularity(prepared.train, None, None)
    ranker = item_knn("item_knn", prepared, fallback, **settings)
    found = ranker.score(torch.arange(13)).numpy()
    expected = densely(prepared, **settings)
    scored = expected > 0
    assert 0 < scored.sum() < scored.size
    assert np.allclose(found[scored], expected[scored], rtol=1e-5)


def test_items_without_a_common_user_stand_below_in_order_of_the_fallback(prepared_of):
    # Two islands of items; item 5 is in no row.
    pairs = [(0, 0), (0, 1), (1, 1), (2, 2), (2, 3), (3, 3), (4, 4), (4, 3)]
    prepared = prepared_of(pairs, 5, 6)
    fallback = torch.tensor([9.0, 8.0, 2.0, 3.0, 2.5, 7.0])
    ranker = item_knn("item_knn", prepared, fallback, neighbours=9, shrink=0.0, norm=0.5)
    found = ranker.top_k(torch.tensor([1]), 6)
    # Item 0 shares user 0 with item 1; the rest, item 1 among them, is the fallback.
    assert found.item_idx.tolist() == [[0, 1, 5, 3, 4, 2]]
    assert bool((found.scores[0, 1:] < 0).all())


def test_recency_moves_the_choice_to_what_came_next_lately(prepared_of):
    # Item 1 went with item 0 often and long ago, item 2 less often but now.
    pairs = [(user, 0) for user in range(5)] + [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 0)]
    days = [0] * 5 + [50, 50, 50, 1, 1, 0]
    prepared = prepared_of(pairs, 6, 3, days=days)
    fallback = torch.zeros(3)
    settings = {"neighbours": 9, "shrink": 0.0, "norm": 0.0}
    user, seen = torch.tensor([5]), prepared.train.user_items().take(torch.tensor([5]))
    plain = item_knn("x", prepared, fallback, **settings).top_k(user, 1, seen=seen)
    recent = item_knn("x", prepared, fallback, half_life_d=5.0, **settings).top_k(
        user, 1, seen=seen
    )
    assert (plain.item_idx.item(), recent.item_idx.item()) == (1, 2)
