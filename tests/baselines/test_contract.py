"""What every ranker promises, whatever it ranks by."""

from dataclasses import replace

import pytest
import torch

import recclr.baselines.popularity as popularity_module
from recclr.baselines import BaselineChoice, refit_baseline
from recclr.data.log import CategoricalColumn, Csr, DenseColumn
from recclr.topk import EmbeddingRanker

SETTINGS = {
    "popularity": {},
    "recent_popularity": {"half_life_d": 10.0},
    "item_knn": {"neighbours": 5, "shrink": 1.0, "norm": 0.5},
    "recent_item_knn": {"neighbours": 9, "shrink": 0.0, "norm": 0.3, "half_life_d": 20.0},
    "als": {"dim": 2, "regularization": 1.0, "alpha": 5.0, "iterations": 10},
    "bpr": {"dim": 3, "learning_rate": 0.1, "regularization": 0.001, "iterations": 300},
    "spectral": {"dim": 2, "item_power": 0.5},
    "ease": {"regularization": 3.0},
    "content": {"half_life_d": None},
}
PERSONAL = [name for name in SETTINGS if "popularity" not in name]
FACTORS = ("als", "bpr", "spectral")


def fitted(name, prepared, seed=1):
    settings = dict(SETTINGS[name])
    if name in PERSONAL:
        settings["fallback_half_life_d"] = 15.0
    return refit_baseline(BaselineChoice(name, settings, 0.0), prepared, seed)


def features(num_items):
    """A category and a vector; every third item lacks the one, every fourth the other."""
    places = torch.arange(num_items)
    category = torch.where(places % 3 == 2, 0, 1 + places % 2).int()
    present = (places % 4 != 3).float()
    angle = places.float()
    vectors = torch.stack([angle.cos() * present, angle.sin() * present, 1 - present], 1)
    return {"kind": CategoricalColumn(category, 3), "vector": DenseColumn(vectors)}


@pytest.fixture(params=[*SETTINGS, "embedding"])
def case(request, random_prepared):
    """A ranker on random data, and the data."""
    prepared = random_prepared(3, columns=features(11))
    if request.param == "embedding":
        draws = torch.Generator().manual_seed(2)
        vectors = [torch.randn(size, 4, generator=draws) for size in (14, 11)]
        return EmbeddingRanker("embedding", *vectors), prepared
    return fitted(request.param, prepared), prepared


def everyone(prepared):
    """All users, known and unknown, in no order and some twice."""
    return torch.tensor([4, 0, 12, 11, 3, 3, 13, 2, 99])


def seen_of(prepared, users):
    return prepared.train.user_items(100).take(users)


def test_the_whole_corpus_is_ranked_once_and_scores_fall(case):
    ranker, prepared = case
    users = everyone(prepared)
    found = ranker.top_k(users, 11)
    assert found.item_idx.dtype == torch.int64
    assert found.scores.dtype == torch.float32
    assert found.item_idx.sort(1).values.tolist() == [list(range(11))] * len(users)
    falls = found.scores[:, :-1] - found.scores[:, 1:]
    assert bool((falls >= 0).all())
    ties = falls == 0
    assert bool((found.item_idx[:, 1:] > found.item_idx[:, :-1])[ties].all())


def test_a_shorter_ranking_is_the_beginning_of_the_longer(case):
    ranker, prepared = case
    users = everyone(prepared)
    whole, short = (ranker.top_k(users, k) for k in (11, 4))
    assert torch.equal(short.item_idx, whole.item_idx[:, :4])


def test_seen_items_are_left_out_and_the_others_keep_their_order(case):
    ranker, prepared = case
    users = everyone(prepared)
    seen = seen_of(prepared, users)
    whole, found = ranker.top_k(users, 11), ranker.top_k(users, 11, seen=seen)
    for row in range(len(users)):
        hidden = set(seen.row(row).tolist())
        left = [item for item in whole.item_idx[row].tolist() if item not in hidden]
        assert found.item_idx[row].tolist() == left + [-1] * len(hidden)
        assert bool((found.scores[row, len(left) :] == -torch.inf).all())


@pytest.mark.parametrize("with_seen", [True, False])
def test_a_subset_of_items_keeps_the_order_of_the_whole(case, with_seen):
    ranker, prepared = case
    users = everyone(prepared)
    seen = seen_of(prepared, users) if with_seen else None
    items = torch.tensor([1, 2, 5, 6, 10])
    whole = ranker.top_k(users, 11, seen=seen)
    found = ranker.top_k(users, 3, seen=seen, items=items)
    for row in range(len(users)):
        inside = [item for item in whole.item_idx[row].tolist() if item in items.tolist()]
        assert found.item_idx[row].tolist() == (inside + [-1] * 3)[:3]


def test_more_than_the_catalogue_is_padded(case):
    ranker, prepared = case
    users = everyone(prepared)
    short, long = ranker.top_k(users, 11), ranker.top_k(users, 30)
    assert torch.equal(long.item_idx[:, :11], short.item_idx)
    assert bool((long.item_idx[:, 11:] == -1).all())
    assert bool((long.scores[:, 11:] == -torch.inf).all())


def test_nobody_and_nothing(case):
    ranker, _ = case
    nobody = torch.empty(0, dtype=torch.int64)
    empty = Csr(torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int32))
    for seen in (None, empty):
        assert ranker.top_k(nobody, 3, seen=seen).item_idx.shape == (0, 3)
    found = ranker.top_k(torch.tensor([0, 99]), 3, items=nobody)
    assert found.item_idx.tolist() == [[-1] * 3] * 2


def test_blocks_of_users_do_not_change_the_ranking(case, monkeypatch):
    ranker, prepared = case
    users = everyone(prepared)
    seen = seen_of(prepared, users)
    whole = ranker.top_k(users, 5, seen=seen)
    monkeypatch.setattr(popularity_module, "_BLOCK", 2 * 11)
    parts = ranker.top_k(users, 5, seen=seen)
    assert torch.equal(parts.item_idx, whole.item_idx)
    assert torch.equal(parts.scores, whole.scores)


@pytest.mark.parametrize("name", PERSONAL)
def test_users_without_train_rows_get_recent_popularity(name, random_prepared):
    prepared = random_prepared(4, columns=features(11))
    choice = BaselineChoice("recent_popularity", {"half_life_d": 15.0}, 0.0)
    fallback = refit_baseline(choice, prepared, 1)
    strangers = torch.tensor([12, 13, 500])
    found = fitted(name, prepared).top_k(strangers, 6)
    assert torch.equal(found.item_idx, fallback.top_k(strangers, 6).item_idx)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_seed_decides(name, random_prepared):
    prepared = random_prepared(5, columns=features(11))
    users = torch.arange(12)
    first, again = (fitted(name, prepared, seed=8).top_k(users, 11) for _ in range(2))
    assert torch.equal(first.item_idx, again.item_idx)
    assert torch.equal(first.scores, again.scores)
    if name in ("als", "bpr"):
        other = fitted(name, prepared, seed=9).top_k(users, 11)
        assert not torch.equal(first.scores, other.scores)


class Untouchable:
    def __getattr__(self, name):
        raise AssertionError(f"a baseline looked at held-out rows ({name})")


@pytest.mark.parametrize("name", SETTINGS)
def test_held_out_rows_are_never_looked_at(name, random_prepared):
    prepared = replace(random_prepared(6, columns=features(11)), held_out=Untouchable())
    assert fitted(name, prepared).top_k(torch.arange(3), 2).item_idx.shape == (3, 2)


@pytest.fixture
def checkerboard(prepared_of):
    """Users like the items of their parity; each lacks one of them. With the withheld items."""
    withheld = [2 * (user // 2 % 6) + user % 2 for user in range(24)]
    pairs = [
        (user, item)
        for user in range(24)
        for item in range(12)
        if item % 2 == user % 2 and item != withheld[user]
    ]
    kind = CategoricalColumn((1 + torch.arange(12) % 2).int(), 3)
    # Parity 1 is more popular: its users came twice.
    doubled = pairs + [pair for pair in pairs if pair[1] % 2]
    days = torch.arange(len(doubled)) % 7
    return prepared_of(doubled, 24, 12, days=days, columns={"kind": kind}), withheld


@pytest.mark.parametrize("name", PERSONAL)
def test_the_withheld_item_comes_first(name, checkerboard):
    prepared, withheld = checkerboard
    users = torch.arange(24)
    found = fitted(name, prepared).top_k(users, 1, seen=prepared.train.user_items())
    assert found.item_idx.squeeze(1).tolist() == withheld


def test_popularity_alone_cannot_find_it(checkerboard):
    prepared, withheld = checkerboard
    seen = prepared.train.user_items()
    found = fitted("popularity", prepared).top_k(torch.arange(24), 1, seen=seen)
    right = [a == b for a, b in zip(found.item_idx.squeeze(1).tolist(), withheld, strict=True)]
    assert right == [user % 2 == 1 for user in range(24)]


@pytest.mark.parametrize("name", FACTORS)
def test_more_dimensions_than_users_or_items_are_no_error(name, random_prepared):
    choice = BaselineChoice(name, {**SETTINGS[name], "dim": 64}, 0.0)
    found = refit_baseline(choice, random_prepared(7), 1).top_k(torch.arange(12), 11)
    assert bool(torch.isfinite(found.scores).all())
