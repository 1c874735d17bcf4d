"""The item -> user direction: the other one of the same problem with sides swapped."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from recclr.batches import Batch, BatchSource
from recclr.data.log import EncodedLog
from recclr.objective import Objective
from recclr.settings import LossSettings, NegativesSettings, TrainSettings
from recclr.symmetric import _swapped
from recclr.towers import TwoTower

NUM_USERS, NUM_ITEMS, DIM, NUM_ROWS, BATCH_SIZE = 7, 9, 5, 40, 12
IN_BATCH = NegativesSettings(in_batch=True, uniform=0)
FAMILY = {
    "infonce": {},
    "uncorrected": {"log_q_strength": 0.0},
    "classic": {"log_q": "classic"},
    "decoupled": {"decoupled": True},
    "hard": {"hardness": 0.6},
    "own_only": {"mask_known_positives": False},
}


class Vectors(nn.Module):
    """One free vector per entity."""

    def __init__(self, num_rows, seed):
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(num_rows, DIM, generator=draws))

    def forward(self, rows):
        return self.weight[rows.idx]


class Moody(Vectors):
    """Another vector in every row, as a history that lacks the row's target gives."""

    def forward(self, rows):
        return self.weight[rows.idx] + 0.1 * rows.without[:, None]


def log_of():
    draws = torch.Generator().manual_seed(4)
    users = torch.cat([torch.arange(7), torch.randint(NUM_USERS, (33,), generator=draws)])
    items = torch.cat([torch.arange(9), torch.randint(NUM_ITEMS, (31,), generator=draws)])
    return EncodedLog(
        users.int(), items.int(), NUM_USERS, NUM_ITEMS, timestamp=torch.arange(NUM_ROWS)
    )


LOG = log_of()


def model_of(log, loss, *, user_seed=1, item_seed=2, users=Vectors):
    return TwoTower(
        users(log.num_users, user_seed),
        Vectors(log.num_items, item_seed),
        num_users=log.num_users,
        num_items=log.num_items,
        similarity="cosine",
        loss=loss,
    )


def batch_of(*, pools=False, weight=None):
    rows = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(8))[:BATCH_SIZE]
    pool = [LOG.item_idx[:29], LOG.user_idx[:29]] if pools else [None, None]
    return Batch(LOG.user_idx[rows].long(), LOG.item_idx[rows].long(), weight, None, None, *pool)


def swapped(batch):
    return replace(
        batch,
        user_idx=batch.item_idx,
        item_idx=batch.user_idx,
        pool=batch.user_pool,
        user_pool=batch.pool,
    )


def step(log, loss, model, batch, negatives=IN_BATCH):
    found = Objective(log, loss, negatives, seed=3)(model, batch, 5).loss
    weights = model.user_tower.weight, model.item_tower.weight
    return found.detach(), torch.autograd.grad(found, weights)


@pytest.mark.parametrize("pools", [False, True], ids=["whole_log", "time_cell"])
@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", FAMILY)
def test_it_is_the_same_loss_of_the_swapped_problem(name, share, pools):
    weight = torch.linspace(0.5, 2.0, BATCH_SIZE)
    batch = batch_of(pools=pools, weight=weight)
    loss = LossSettings(temperature=0.4, symmetric=share, **FAMILY[name])
    other = replace(loss, symmetric=1 - share)
    ours = step(LOG, loss, model_of(LOG, loss), batch)
    mirrored = _swapped(LOG)
    theirs = step(
        mirrored, other, model_of(mirrored, other, user_seed=2, item_seed=1), swapped(batch)
    )
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1][::-1], rtol=1e-4, atol=1e-6)
    plain = step(LOG, replace(loss, symmetric=0.0), model_of(LOG, loss), batch)
    assert abs(float(plain[0] - ours[0])) > 1e-3


def test_a_problem_of_shared_weights_has_two_equal_directions():
    """Pairs that come both ways, and one table: each direction is the loss."""
    first, second = torch.tensor([0, 1, 2, 3, 0, 2]), torch.tensor([4, 5, 4, 6, 6, 5])
    users, items = torch.cat([first, second]), torch.cat([second, first])
    log = EncodedLog(users.int(), items.int(), 7, 7)
    batch, found = Batch(users, items, None, None, None, None), []
    for share in (0.0, 0.4, 1.0):
        loss = LossSettings(temperature=0.4, symmetric=share)
        model = model_of(log, loss, user_seed=1, item_seed=1)
        found.append(step(log, loss, model, batch)[0])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.parametrize("users", [Vectors, Moody])
def test_it_is_a_loop_over_items_and_users(users):
    loss = LossSettings(temperature=0.4, symmetric=1.0)
    model, batch = model_of(LOG, loss, users=users), batch_of()
    found = Objective(LOG, loss, NegativesSettings(in_batch=True, uniform=5), seed=3)(
        model, batch, 5
    ).loss
    user_idx, item_idx = batch.user_idx.tolist(), batch.item_idx.tolist()
    pairs = set(zip(LOG.user_idx.tolist(), LOG.item_idx.tolist(), strict=True))
    vectors = model.user_tower.weight[batch.user_idx].detach()
    if users is Moody:
        vectors = vectors + 0.1 * batch.item_idx[:, None]
    vectors = normalize(vectors.double(), dim=1)
    items = normalize(model.item_tower.weight.detach().double(), dim=1)
    counts = torch.bincount(LOG.user_idx, minlength=NUM_USERS).tolist()
    assert len(set(user_idx)) < BATCH_SIZE
    losses = []
    for b in range(BATCH_SIZE):
        positive = math.exp(float(vectors[b] @ items[item_idx[b]]) / 0.4)
        total = positive
        for user in set(user_idx):
            if (user, item_idx[b]) in pairs:
                continue
            expected = (BATCH_SIZE - 1) / (NUM_ROWS - 1) * counts[user]
            score = float(vectors[user_idx.index(user)] @ items[item_idx[b]])
            total += user_idx.count(user) / expected * math.exp(score / 0.4)
        losses.append(math.log(total / positive))
    assert float(found.detach()) == pytest.approx(math.fsum(losses) / BATCH_SIZE, abs=1e-5)


def test_every_user_of_train_is_expected_to_count_once():
    """Over all rows that may join a row, the sum over users estimates the full softmax.

    By listing: each pair of other rows is as likely.
    """
    users, items = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 0, 2])
    log = EncodedLog(users.int(), items.int(), 3, 3)
    loss = LossSettings(temperature=1.0, symmetric=1.0)
    model = model_of(log, loss)
    vectors = (
        normalize(x.weight.detach().double(), dim=1) for x in (model.user_tower, model.item_tower)
    )
    scores = (next(vectors) @ next(vectors).T).exp()
    objective, sums = Objective(log, loss, IN_BATCH, seed=3), []
    for b in range(1, 6):
        for c in range(b + 1, 6):
            rows = torch.tensor([0, b, c])
            batch = Batch(users[rows], items[rows], None, None, None, None)
            # Of the first row alone, as a weight of 0 says of the others.
            weighted = replace(batch, weight=torch.tensor([1.0, 0.0, 0.0]))
            found = float(objective(model, weighted, 0).loss.detach())
            sums.append((math.exp(found) - 1) * float(scores[0, 0]))
    # User 1 is the only one that does not have item 0.
    assert math.fsum(sums) / len(sums) == pytest.approx(float(scores[1, 0]), rel=1e-5)


def test_further_positives_and_the_top_k_concern_the_other_direction_only():
    loss = LossSettings(temperature=0.4, symmetric=1.0)
    plain = step(LOG, loss, model_of(LOG, loss), batch_of())
    for options in ({"positives": 3}, {"top_k": 2}):
        both = step(LOG, replace(loss, **options), model_of(LOG, loss), batch_of())
        torch.testing.assert_close(both, plain)


def test_time_cells_come_with_the_users_of_their_pool_where_they_are_needed():
    settings = TrainSettings(batch_size=6)
    for asked in (False, True):
        source = BatchSource(LOG, settings, seed=2, time_cells=True, user_pools=asked)
        batch = source.batch(1)
        if not asked:
            assert batch.user_pool is None
            continue
        # Row by row they are pairs of the log.
        at = LOG.item_idx.tolist()
        places = [n for n in range(len(at)) if at[n:][: len(batch.pool)] == batch.pool.tolist()]
        users = [LOG.user_idx[n : n + len(batch.pool)].tolist() for n in places]
        assert batch.user_pool.tolist() in users
