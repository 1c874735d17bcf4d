"""Alignment and uniformity against loops over pairs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from recclr.alignment import uniformity
from recclr.batches import Batch, BatchSource
from recclr.building import build_model
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.distributed import ALONE
from recclr.objective import Objective
from recclr.settings import (
    HistorySettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    TowerSettings,
    TrainSettings,
)

NUM_USERS, NUM_ITEMS, D = 7, 11, 5


def loop(vectors, entities):
    found = [
        torch.exp(-2 * (vectors[a] - vectors[b]).square().sum())
        for a in range(len(vectors))
        for b in range(len(vectors))
        if entities[a] != entities[b]
    ]
    return torch.stack(found).mean().log() if found else vectors.sum() * 0


@given(
    seed=st.integers(0, 300), num_rows=st.integers(1, 23), num_entities=st.sampled_from([1, 4, 40])
)
def test_uniformity_is_that_of_a_loop_over_pairs(seed, num_rows, num_entities):
    draws = torch.Generator().manual_seed(seed)
    leaf = torch.randn(num_rows, D, generator=draws, dtype=torch.float64).requires_grad_()
    entities = torch.randint(num_entities, (num_rows,), generator=draws)
    expected = loop(normalize(leaf), entities.tolist())
    found = uniformity(normalize(leaf).float(), entities, ALONE, [num_rows])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)
    (theirs,) = torch.autograd.grad(expected, leaf)
    ours = torch.zeros_like(leaf)
    if found.requires_grad:
        (ours,) = torch.autograd.grad(found, leaf)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_two_opposite_points_are_as_far_apart_as_can_be():
    points = torch.tensor([[1.0, 0], [-1, 0]])
    assert uniformity(points, torch.tensor([3, 5]), ALONE, [2]) == pytest.approx(-8.0)
    assert uniformity(points[[0, 0]], torch.tensor([3, 5]), ALONE, [2]) == pytest.approx(0.0)
    # Of one entity there is no pair.
    assert uniformity(points, torch.tensor([3, 3]), ALONE, [2]) == 0


def log_of(num_rows=36):
    draws = torch.Generator().manual_seed(2)
    users = torch.cat(
        [torch.arange(NUM_USERS), torch.randint(NUM_USERS, (num_rows,), generator=draws)]
    )
    items = torch.cat(
        [torch.arange(NUM_USERS), torch.randint(NUM_ITEMS, (num_rows,), generator=draws)]
    )
    weight = 0.5 + torch.rand(len(users), generator=draws)
    return EncodedLog(users.int(), items.int(), NUM_USERS, NUM_ITEMS, weight=weight)


LOG = log_of()


def model_of(loss):
    prepared = Prepared(LOG, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS))
    # A history without its target: two rows of one user have two vectors.
    return build_model(
        prepared,
        user=TowerSettings(history=HistorySettings(length=4)),
        item=TowerSettings(),
        model=ModelSettings(embedding_dim=D),
        loss=loss,
        seed=1,
    ).train()


@pytest.mark.parametrize("gamma", [None, 0.3])
def test_a_step_is_the_sum_of_both_terms(monkeypatch, gamma):
    loss = LossSettings(kind="alignment_uniformity", uniformity_weight=gamma)
    model, rows = model_of(loss), torch.arange(5, 19)
    batch = Batch(
        LOG.user_idx[rows].long(), LOG.item_idx[rows].long(), LOG.weight[rows], None, None, None
    )
    embedded = {}
    for side in ("users", "items"):
        original = getattr(model, f"embed_{side}")
        monkeypatch.setattr(
            model,
            f"embed_{side}",
            lambda rows, original=original, side=side: embedded.setdefault(side, original(rows)),
        )
    stats = Objective(LOG, loss, NegativesSettings(), seed=3)(model, batch, 0)
    users = embedded["users"].detach().double()
    distinct, places = torch.unique(batch.item_idx, return_inverse=True)
    assert len(embedded["items"]) == len(distinct) < len(rows)
    items = embedded["items"].detach().double()[places]
    share = batch.weight.double() / batch.weight.double().sum()
    alignment = sum(
        float(w) * float((u - i).norm()) ** 2 for w, u, i in zip(share, users, items, strict=True)
    )
    spread = loop(users, batch.user_idx.tolist()) + loop(items, batch.item_idx.tolist())
    weight = 1.0 if gamma is None else gamma
    expected = alignment + weight * float(spread) / 2
    assert float(stats.loss.detach()) == pytest.approx(expected, abs=1e-5)
    assert (stats.num_candidates, int(stats.num_masked), stats.num_rows) == (0, 0, len(rows))
    assert (stats.masked_share, stats.duplicate_share) == (0.0, 1 - len(distinct) / len(rows))


def test_batches_of_a_step_count_by_their_weight():
    loss = LossSettings(kind="alignment_uniformity")
    model = model_of(loss)
    train = TrainSettings(batch_size=16, accumulate=3)
    batches = BatchSource(LOG, train, seed=0, time_cells=False).step(0)
    assert len({len(batch.user_idx) for batch in batches.values()}) > 1
    objective = Objective(LOG, loss, NegativesSettings(), seed=3)
    whole = sum(float(batch.total()) for batch in batches.values())
    expected = sum(
        float(objective(model, batch, n).loss.detach()) * float(batch.total()) / whole
        for n, batch in batches.items()
    )
    found = float(objective.backward(model, batches).loss)
    assert found == pytest.approx(expected, abs=1e-5)
    assert not math.isnan(found)
