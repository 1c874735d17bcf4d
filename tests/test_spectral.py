"""The spectral solution as a start of training. Its values: ``baselines/test_factors.py``."""

import pytest
import torch

from recclr.building import build_model
from recclr.config import parse_config
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.errors import ConfigError
from recclr.settings import (
    HistorySettings,
    IdSettings,
    LossSettings,
    ModelSettings,
    TowerSettings,
)
from recclr.spectral import spectral_factors, start_from_spectral, starts_spectral


def two_groups(num_spare=2):
    """Users 0-5 like items 0-4, users 6-9 like items 5-7; the last users and items have nothing."""
    users = torch.cat(
        [torch.arange(6).repeat_interleave(5), 6 + torch.arange(4).repeat_interleave(3)]
    )
    items = torch.cat([torch.arange(5).repeat(6), torch.arange(5, 8).repeat(4)])
    # One row each is missing, so that popularity differs within a group.
    keep = torch.arange(len(users)).remainder(11) != 3
    log = EncodedLog(users[keep].int(), items[keep].int(), 10 + num_spare, 8 + num_spare)
    return Prepared(log, FeatureTable(log.num_users), FeatureTable(log.num_items))


def model_of(prepared, similarity="cosine", init_std=1.0, dim=3, user=None, item=None):
    settings = ModelSettings(embedding_dim=dim, similarity=similarity, init_std=init_std)
    return build_model(
        prepared,
        user=user or TowerSettings(),
        item=item or TowerSettings(),
        model=settings,
        loss=LossSettings(),
        seed=3,
    )


def tables(model):
    towers = (model.user_tower, model.item_tower)
    return [tower.parts[0].table.weight.detach().clone() for tower in towers]


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_a_model_that_starts_there_knows_the_groups_before_its_first_step(similarity):
    prepared = two_groups()
    model = model_of(prepared, similarity, dim=2)  # one direction for each group
    start_from_spectral(model, prepared.train, init_std=1.0, seed=0)
    users, items = model.all_vectors(None)
    scores = users[:10] @ items[:8].T
    own = torch.zeros(10, 8, dtype=torch.bool)
    own[:6, :5] = own[6:, 5:] = True
    assert scores[own].min() > scores[~own].max() + 0.1


def test_scores_under_dot_product_are_those_of_the_baseline_up_to_a_factor():
    prepared = two_groups()
    model = model_of(prepared, "dot", init_std=0.7, dim=4)
    start_from_spectral(model, prepared.train, init_std=0.7, seed=0)
    users, items = model.all_vectors(None)
    expected_users, expected_items = spectral_factors(prepared.train, dim=4, seed=0)
    found, expected = users[:10] @ items[:8].T, expected_users[:10] @ expected_items[:8].T
    factor = found.max() / expected.max()
    torch.testing.assert_close(found, expected * factor, atol=1e-5, rtol=1e-4)
    for table, count in zip(tables(model), (10, 8), strict=True):
        squares = table[1 : 1 + count].square().sum(1)
        assert squares.mean() == pytest.approx(0.7**2, rel=1e-4)
        assert squares.max() > 1.01 * squares.min()


def test_rows_have_the_length_of_fresh_ones_and_the_unknown_keep_theirs():
    prepared = two_groups()
    model = model_of(prepared, init_std=0.4)
    before = tables(model)
    start_from_spectral(model, prepared.train, init_std=0.4, seed=0)
    for old, new, count in zip(before, tables(model), (10, 8), strict=True):
        lengths = new[1 : 1 + count].norm(dim=1)
        torch.testing.assert_close(lengths, torch.full((count,), 0.4))
        assert torch.equal(old[0], new[0])
        assert torch.equal(old[1 + count :], new[1 + count :])


def test_repeated_pairs_count_once_and_a_seed_decides():
    log = two_groups().train
    twice = EncodedLog(
        torch.cat([log.user_idx, log.user_idx]),
        torch.cat([log.item_idx, log.item_idx]),
        log.num_users,
        log.num_items,
    )
    once = spectral_factors(log, dim=3, seed=5)
    torch.manual_seed(99)
    again = spectral_factors(twice, dim=3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize(("num_users", "num_items"), [(90, 61), (53, 88)])
def test_truncated_factors_are_those_of_torch_on_the_dense_matrix(num_users, num_items):
    draws = torch.Generator().manual_seed(8)
    users = torch.randint(num_users, (1500,), generator=draws)
    items = (torch.rand(1500, generator=draws) ** 2 * num_items).long()
    log = EncodedLog(users.int(), items.int(), num_users, num_items)
    rows = torch.zeros(num_users, num_items)
    rows[users, items] = 1
    user_degree, item_degree = (rows.sum(side).clamp(min=1) for side in (1, 0))
    torch.manual_seed(4)
    normalised = rows * user_degree.rsqrt()[:, None] * item_degree.rsqrt()
    # Its subspace has as many directions to spare; with fewer, the last ones would differ.
    right = torch.svd_lowrank(normalised, q=7 + 10, niter=4)[2][:, :7]
    found_users, found_items = spectral_factors(log, dim=7, seed=4)
    expected = rows @ (right / item_degree.sqrt()[:, None]) @ right.T * item_degree.sqrt()
    assert torch.allclose(found_users @ found_items.T, expected, atol=1e-4)


def test_more_dimensions_than_the_matrix_has_are_zero():
    users, items = spectral_factors(two_groups(0).train, dim=20)
    assert users.shape == (10, 20)
    assert items.shape == (8, 20)
    assert items[:, 8:].abs().max() == 0
    assert items[:, :8].abs().max() > 0.1


def test_one_tower_with_an_id_is_enough_and_none_is_refused():
    prepared = two_groups()
    past = TowerSettings(id=IdSettings(enabled=False), history=HistorySettings(length=9))
    model = model_of(prepared, user=past)
    before = model.item_tower.parts[0].table.weight.detach().clone()
    start_from_spectral(model, prepared.train, init_std=1.0, seed=0)
    assert not torch.equal(model.item_tower.parts[0].table.weight, before)

    model.item_tower = torch.nn.Identity()
    with pytest.raises(ConfigError, match=r"user\.id or item\.id"):
        start_from_spectral(model, prepared.train, init_std=1.0, seed=0)


def test_auto_starts_there_where_both_sides_have_ids_and_the_log_is_not_huge():
    def starts(num_rows=20_000_000, **sections):
        return starts_spectral(parse_config({"data": {"events": "e.parquet"}} | sections), num_rows)

    past = {"id": {"enabled": False}, "history": {"length": 9}}
    assert starts()
    assert not starts(20_000_001)
    assert not starts(user=past)
    assert not starts(item={"id": {"enabled": False}, "features": {"a": {"kind": "categorical"}}})
    assert not starts(model={"mode": "item_item"})
    for user in ({}, past):
        assert starts(20_000_001, user=user, model={"init": "spectral"})
        assert not starts(user=user, model={"init": "random"})
