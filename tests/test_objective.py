"""One step, end to end, against the same sums written out."""

import pytest
import torch

from recclr.batches import Batch
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.objective import Objective
from recclr.settings import (
    IdSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    TowerSettings,
)
from recclr.towers import build_model

NUM_USERS, NUM_ITEMS = 6, 11


def planted():
    draws = torch.Generator().manual_seed(2)
    # Everybody and everything once: what train never saw has another vector when it is served.
    users = torch.cat(
        [torch.arange(NUM_ITEMS) % NUM_USERS, torch.randint(NUM_USERS, (19,), generator=draws)]
    )
    items = torch.cat([torch.arange(NUM_ITEMS), torch.randint(NUM_ITEMS, (19,), generator=draws)])
    return EncodedLog(users.int(), items.int(), NUM_USERS, NUM_ITEMS)


def model_of(loss, *, dropout=0.0):
    tower = TowerSettings(id=IdSettings(dropout=dropout))
    prepared = Prepared(planted(), FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS))
    return build_model(
        prepared, user=tower, item=tower, model=ModelSettings(embedding_dim=5), loss=loss, seed=1
    ).train()


def batch_of(rows, weight=None):
    log = planted()
    return Batch(log.user_idx[rows].long(), log.item_idx[rows].long(), weight, None, None, None)


def step_loss(loss, *, negatives=None, weight=None, dropout=0.0, step=0, bfloat16=False):
    objective = Objective(
        planted(), loss, negatives or NegativesSettings(uniform=7), seed=3, bfloat16=bfloat16
    )
    batch = batch_of(torch.arange(4, 13), weight)
    return objective(model_of(loss, dropout=dropout), batch, step)


def full_softmax(loss, weight=None):
    """Loops over rows and items; the user's other items are no negatives."""
    model, log = model_of(loss), planted()
    users, items = model.all_vectors(None)
    known = set(zip(log.user_idx.tolist(), log.item_idx.tolist(), strict=True))
    batch = batch_of(torch.arange(4, 13))
    total = []
    for user, item in zip(batch.user_idx.tolist(), batch.item_idx.tolist(), strict=True):
        logits = users[user] @ items.T / loss.temperature
        rest = [j for j in range(NUM_ITEMS) if (user, j) not in known]
        negatives = logits[rest].exp().sum()
        if loss.second_temperature is None:
            total.append(torch.log(logits[item].exp() + negatives) - logits[item])
        else:
            total.append(loss.second_temperature * negatives.log() - logits[item])
    values = torch.stack(total)
    weight = torch.ones(len(values)) if weight is None else weight
    return float((values * weight).sum() / weight.sum())


@pytest.mark.parametrize("second", [None, 1.2])
def test_full_softmax_equals_the_loop(second):
    loss = LossSettings(kind="full_softmax", temperature=0.4, second_temperature=second)
    weight = torch.linspace(0.5, 2.0, 9)
    found = step_loss(loss, weight=weight)
    assert float(found.loss.detach()) == pytest.approx(full_softmax(loss, weight), abs=1e-5)
    assert (found.num_candidates, found.num_rows) == (NUM_ITEMS, 9)


def test_masking_can_be_switched_off():
    with_mask, without = (
        step_loss(LossSettings(temperature=0.4, mask_known_positives=on)) for on in (True, False)
    )
    assert with_mask.num_masked > without.num_masked
    # More negatives make the loss larger.
    assert float(without.loss.detach()) > float(with_mask.loss.detach())


def test_every_setting_of_the_loss_changes_it():
    base = LossSettings(temperature=0.4)
    values = {
        float(step_loss(loss).loss.detach())
        for loss in (
            base,
            LossSettings(temperature=0.3),
            LossSettings(temperature="learned", initial_temperature=0.2),
            LossSettings(temperature=0.4, second_temperature=1.2),
            LossSettings(temperature=0.4, log_q_strength=0.5),
            LossSettings(temperature=0.4, mask_known_positives=False),
            LossSettings(kind="full_softmax", temperature=0.4),
        )
    }
    assert len(values) == 7


def test_a_step_repeats_its_draws_and_steps_differ():
    loss = LossSettings(temperature=0.4)
    first, again, other = (
        float(step_loss(loss, dropout=0.5, step=step).loss.detach()) for step in (4, 4, 5)
    )
    assert first == again
    assert first != other


def test_bfloat16_towers_keep_a_float32_loss_near_by():
    loss = LossSettings(temperature=0.4)
    exact, rough = (step_loss(loss, bfloat16=on).loss for on in (False, True))
    assert rough.dtype == torch.float32
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), rel=0.02)


def test_gradients_reach_both_tables_and_a_learned_temperature():
    loss = LossSettings(temperature="learned")
    model = model_of(loss)
    objective = Objective(planted(), loss, NegativesSettings(uniform=7), seed=3)
    objective(model, batch_of(torch.arange(4, 13)), 0).loss.backward()
    assert float(model.log_temperature.grad.abs()) > 0
    for table in model.tables().values():
        assert all(float(v.grad.abs().sum()) > 0 for _, v in table.lookups)
