"""One step, end to end, against the same sums written out."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from recclr.batches import Batch
from recclr.building import build_model
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.objective import Objective
from recclr.settings import (
    IdSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    PopularitySettings,
    TowerSettings,
)

NUM_USERS, NUM_ITEMS = 6, 11
ROWS = torch.arange(4, 13)
WEIGHT = torch.linspace(0.5, 2.0, len(ROWS))
SOURCES = {
    "in_batch": NegativesSettings(in_batch=True, uniform=0),
    "uniform": NegativesSettings(in_batch=False, uniform=4),
    "mixed": NegativesSettings(in_batch=True, uniform=7, popularity=PopularitySettings(count=5)),
}


def planted():
    draws = torch.Generator().manual_seed(2)
    # Everybody and everything once: what train never saw has another vector when it is served.
    # Some pairs come twice.
    users = torch.cat(
        [torch.arange(NUM_ITEMS) % NUM_USERS, torch.randint(NUM_USERS, (19,), generator=draws)]
    )
    items = torch.cat([torch.arange(NUM_ITEMS), torch.randint(NUM_ITEMS, (19,), generator=draws)])
    return EncodedLog(users.int(), items.int(), NUM_USERS, NUM_ITEMS)


LOG = planted()


def model_of(loss, *, dropout=0.0, mlp=(), similarity="cosine"):
    tower = TowerSettings(id=IdSettings(dropout=dropout), mlp=mlp)
    prepared = Prepared(LOG, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS))
    settings = ModelSettings(embedding_dim=5, similarity=similarity)
    return build_model(prepared, user=tower, item=tower, model=settings, loss=loss, seed=1).train()


def batch_of(*, weight=None, pool=None):
    return Batch(LOG.user_idx[ROWS].long(), LOG.item_idx[ROWS].long(), weight, None, None, pool)


def objective_of(loss, negatives=SOURCES["mixed"], **options):
    return Objective(LOG, loss, negatives, seed=3, **options)


def step_loss(loss, *, dropout=0.0, step=0):
    model = model_of(loss, dropout=dropout)
    return float(objective_of(loss)(model, batch_of(), step).loss.detach())


def written_out(loss, model, batch, candidates, weights):
    """Mean loss and number of masked pairs by loops over rows and candidates.

    Each candidate enters the sum by its weight.
    """
    users, items = (vectors.double() for vectors in model.all_vectors(None))
    known = set(zip(LOG.user_idx.tolist(), LOG.item_idx.tolist(), strict=True))
    temperature = float(model.temperature().detach())
    losses, num_masked = [], 0
    for user, item in zip(batch.user_idx.tolist(), batch.item_idx.tolist(), strict=True):
        masked = known if loss.mask_known_positives else {(user, item)}
        total = 0.0
        for candidate, weight in zip(candidates, weights, strict=True):
            if (user, candidate) in masked:
                num_masked += 1
                continue
            total += weight * math.exp(float(users[user] @ items[candidate]) / temperature)
        positive = float(users[user] @ items[item]) / temperature
        if loss.second_temperature is not None:
            losses.append(loss.second_temperature * (math.log(total) if total else 0.0) - positive)
        else:
            losses.append(math.log(math.exp(positive) + total) - positive)
    importance = [1.0] * len(losses) if batch.weight is None else batch.weight.tolist()
    mean = sum(map(math.prod, zip(losses, importance, strict=True))) / sum(importance)
    return mean, num_masked


@pytest.mark.parametrize("symmetric", [0.0, 0.3])
def test_a_time_cell_counts_by_its_weight_among_all(symmetric):
    loss = LossSettings(temperature=0.4, symmetric=symmetric)
    plain = batch_of()
    heavy = replace(
        plain,
        weight=torch.full((len(ROWS),), 3.0),
        expected_weight=torch.tensor(2.0 * len(ROWS)),
    )
    found = {}
    for name, batch in (("plain", plain), ("heavy", heavy)):
        model = model_of(loss)
        step_of = objective_of(loss)(model, batch, 0)
        step_of.loss.backward()
        parts = model.item_tower.parts[0].table.take_lookups()
        found[name] = step_of.loss.detach(), *(grads for _, grads, _ in parts)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(1.5 * one, other)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("second", [None, 1.2])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["equal", "weighted"])
def test_full_softmax_equals_the_loop(masked, second, weight):
    loss = LossSettings(
        kind="full_softmax",
        temperature=0.4,
        second_temperature=second,
        mask_known_positives=masked,
    )
    model, batch = model_of(loss), batch_of(weight=weight)
    found = objective_of(loss)(model, batch, 0)
    mean, num_masked = written_out(loss, model, batch, range(NUM_ITEMS), [1.0] * NUM_ITEMS)
    assert float(found.loss.detach()) == pytest.approx(mean, abs=1e-5)
    assert (found.num_candidates, found.num_masked) == (NUM_ITEMS, num_masked)
    assert found.num_rows == len(ROWS)


def test_full_softmax_without_masks_is_cross_entropy():
    loss = LossSettings(kind="full_softmax", temperature=0.4, mask_known_positives=False)
    model, batch = model_of(loss), batch_of()
    users, items = model.all_vectors(None)
    expected = cross_entropy(users[batch.user_idx] @ items.T / 0.4, batch.item_idx)
    torch.testing.assert_close(objective_of(loss)(model, batch, 0).loss.detach(), expected)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"log_q_strength": 0.0},
        {"log_q_strength": 0.4},
        {"mask_known_positives": False},
        {"second_temperature": 1.2},
        {"temperature": "learned", "initial_temperature": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_sampled_step_equals_the_loop(source, options, similarity):
    loss = LossSettings(**{"temperature": 0.4, **options})
    model, batch = model_of(loss, similarity=similarity), batch_of(weight=WEIGHT)
    objective = objective_of(loss, SOURCES[source])
    found = objective(model, batch, 6)
    drawn = objective._candidates(batch, 6)
    candidates = drawn.candidate_idx.tolist()
    mean, num_masked = written_out(loss, model, batch, candidates, drawn.log_weights.exp().tolist())
    assert float(found.loss.detach()) == pytest.approx(mean, abs=1e-5)
    assert (found.num_candidates, found.num_masked) == (len(candidates), num_masked)


def test_strength_moves_log_weights_from_draws_to_draws_over_expected():
    none, half, full = (
        objective_of(LossSettings(log_q_strength=strength))._candidates(batch_of(), 2).log_weights
        for strength in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(half, (none + full) / 2)
    assert not torch.equal(none, full)


def test_a_time_cell_is_corrected_by_its_pool():
    batch = batch_of(pool=LOG.item_idx[:17])
    found = objective_of(LossSettings(), SOURCES["in_batch"])._candidates(batch, 0)
    counts = torch.bincount(LOG.item_idx[:17], minlength=NUM_ITEMS)[found.candidate_idx]
    draws = torch.bincount(batch.item_idx, minlength=NUM_ITEMS)[found.candidate_idx]
    expected = (len(ROWS) - 1) / 16 * counts
    torch.testing.assert_close(found.log_weights, (draws / expected).log())


def test_a_step_repeats_its_draws_whatever_was_drawn_elsewhere():
    loss = LossSettings(temperature=0.4)
    first = step_loss(loss, dropout=0.5, step=4)
    torch.manual_seed(99)
    assert step_loss(loss, dropout=0.5, step=4) == first
    assert step_loss(loss, dropout=0.5, step=5) != first
    assert step_loss(loss, step=4) != first


def test_negatives_follow_from_seed_and_step():
    loss, batch = LossSettings(), batch_of()
    first, again, later = (
        objective_of(loss)._candidates(batch, step).log_weights for step in (4, 4, 5)
    )
    other = Objective(LOG, loss, SOURCES["mixed"], seed=4)._candidates(batch, 4).log_weights
    assert first.tolist() == again.tolist()
    assert first.tolist() != later.tolist()
    assert first.tolist() != other.tolist()


def test_dropout_differs_between_steps_where_candidates_do_not():
    loss = LossSettings(kind="full_softmax", temperature=0.4)
    assert step_loss(loss, step=4) == step_loss(loss, step=5)
    assert step_loss(loss, dropout=0.5, step=4) != step_loss(loss, dropout=0.5, step=5)


def test_bfloat16_towers_keep_a_float32_loss_near_by():
    loss = LossSettings(temperature=0.4)
    model = model_of(loss, mlp=(7,))
    draws = torch.Generator().manual_seed(0)
    for tower in (model.user_tower, model.item_tower):
        # A block starts as the identity, in which there is nothing to round.
        torch.nn.init.normal_(tower.blocks[0].fall.weight, generator=draws)
    exact, rough = (
        objective_of(loss, bfloat16=bfloat16)(model, batch_of(), 0).loss.detach()
        for bfloat16 in (False, True)
    )
    assert rough.dtype == torch.float32
    assert float(rough) != float(exact)
    # Cosines are off by a few units of 2^-8, and the temperature divides them.
    assert float(rough) == pytest.approx(float(exact), abs=4 * 2**-8 / 0.4)


def test_gradients_reach_both_tables_and_a_learned_temperature():
    loss = LossSettings(temperature="learned")
    model = model_of(loss)
    objective_of(loss)(model, batch_of(), 0).loss.backward()
    assert float(model.log_temperature.grad.abs()) > 0
    for table in model.tables().values():
        assert all(float(each.vectors.grad.abs().sum()) > 0 for each in table.lookups)


def test_the_slope_of_a_learned_temperature_equals_finite_differences():
    loss = LossSettings(temperature="learned", initial_temperature=0.3)
    model, step = model_of(loss), 1e-2
    objective_of(loss)(model, batch_of(), 0).loss.backward()

    def moved(by):
        with torch.no_grad():
            model.log_temperature.add_(by)
            value = float(objective_of(loss)(model, batch_of(), 0).loss)
            model.log_temperature.sub_(by)
        return value

    slope = float(model.log_temperature.grad)
    # The error is about step² times the logits, of which the largest is 1 / 0.3.
    assert slope == pytest.approx((moved(step) - moved(-step)) / (2 * step), abs=4e-4)


@pytest.mark.parametrize("kind", ["infonce", "full_softmax"])
def test_information_is_log_of_the_alternatives_less_the_loss(kind):
    loss = LossSettings(kind=kind, temperature=0.4, mask_known_positives=False)
    model, batch = model_of(loss), batch_of()
    objective = objective_of(loss, NegativesSettings(in_batch=False, uniform=7))
    found = objective(model, batch, 6)
    candidates = objective._candidates(batch, 6)
    # Each row's own item is masked: what it stands for is no alternative, but the positive is.
    weights = candidates.log_weights.exp().sum()
    alternatives = 1 + float(weights) * (1 - found.num_masked / (found.num_candidates * len(ROWS)))
    assert found.information == pytest.approx(
        math.log(alternatives) - float(found.loss.detach()), abs=1e-6
    )
    if kind == "full_softmax":
        assert alternatives == pytest.approx(NUM_ITEMS)
    other = LossSettings(temperature=0.4, hardness=0.1)
    assert objective_of(other)(model, batch, 6).information is None


@pytest.mark.parametrize(
    "options",
    [
        {"log_q": "classic"},
        {"decoupled": True},
        {"hardness": 0.5},
        {"top_k": 3},
        {"top_k": 3, "top_k_temperature": 0.3},
        {"symmetric": 0.5},
        {"positives": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_every_key_of_the_softmax_family_reaches_the_step(options, chunk_size):
    found = []
    for settings in ({}, options):
        loss = LossSettings(temperature=0.4, **settings)
        model = model_of(loss)
        value = objective_of(loss, chunk_size=chunk_size)(model, batch_of(), 2).loss
        value.backward()
        assert value.isfinite()
        for table in model.tables().values():
            assert all(each.vectors.grad.isfinite().all() for each in table.lookups)
        found.append(float(value.detach()))
    assert abs(found[0] - found[1]) > 1e-3
    if "top_k_temperature" in options:
        default = LossSettings(temperature=0.4, top_k=3)
        value = objective_of(default)(model_of(default), batch_of(), 2).loss
        assert abs(float(value.detach()) - found[1]) > 1e-3


@pytest.mark.parametrize(
    "options",
    [{"log_q": "classic"}, {"decoupled": True}, {"hardness": 0.5}, {"hardness": 2.0}],
    ids=str,
)
def test_fixed_shapes_change_nothing(options):
    loss, found = LossSettings(temperature=0.4, **options), []
    for fixed in (False, True):
        model, objective = model_of(loss), objective_of(loss, fixed_shapes=fixed)
        objective.prepare(2)
        value = objective(model, batch_of(weight=WEIGHT), 2).loss
        value.backward()
        gradients = [
            torch.zeros_like(table.weight).index_add_(0, look.rows, look.vectors.grad)
            for table in model.tables().values()
            for look in table.lookups
        ]
        found.append((value.detach(), gradients))
    torch.testing.assert_close(found[1], found[0])
