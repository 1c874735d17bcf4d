"""Negatives of a row alone: who is drawn, what each counts, and that the sum stays that of all."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.batches import Batch
from recclr.building import build_model
from recclr.data.log import Csr, EncodedLog, FeatureTable, Prepared
from recclr.errors import ConfigError, ShapeError
from recclr.known_positives import KnownPositives
from recclr.objective import Objective
from recclr.order import generator
from recclr.own_negatives import OwnNegatives
from recclr.settings import (
    ExplicitSettings,
    LossSettings,
    MinedSettings,
    ModelSettings,
    NegativesSettings,
    PopularitySettings,
    TowerSettings,
)

NUM_USERS, NUM_ITEMS = 6, 23
# The last user has everything: an item that train never saw is served with another vector.
USERS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 4, *[5] * NUM_ITEMS])
ITEMS = torch.tensor([1, 4, 9, 4, 0, 2, 2, 5, 6, 7, 8, 22, *range(NUM_ITEMS)])
LOG = EncodedLog(USERS.int(), ITEMS.int(), NUM_USERS, NUM_ITEMS)
KNOWN = [set(ITEMS[user == USERS].tolist()) for user in range(NUM_USERS)]
# Users with as many as can be, fewer than are drawn, none, one, as many as are drawn.
LISTS = [[20, 3, 11, 12, 13, 0, 21], [6, 7], [], [9], [3, 5, 10], []]
REFUSED = [[2], [3, 5, 7, 9, 11], [0, 1], [], [7, 8, 9, 10], []]
MINED = MinedSettings(count=3, pool=7, depth=30)
EXPLICIT = ExplicitSettings(events=("dislike",), count=2, weight=2.5)


def table_of(lists, width=7):
    return torch.tensor([items + [-1] * (width - len(items)) for items in lists]).int()


def csr_of(lists):
    rows = [user for user, items in enumerate(lists) for _ in items]
    values = [item for items in lists for item in items]
    return Csr.from_pairs(torch.tensor(rows), torch.tensor(values), len(lists))


def own_of(*, mined=True, explicit=True, strength=1.0, log=LOG):
    sources = NegativesSettings(
        in_batch=True, mined=MINED if mined else None, explicit=EXPLICIT if explicit else None
    )
    own = OwnNegatives(log, sources, log_q_strength=strength, explicit=csr_of(REFUSED))
    if mined:
        own.refill(table_of(LISTS))
    return own


@given(st.integers(0, 500), st.sampled_from([0.0, 0.4, 1.0]))
@settings(max_examples=30)
def test_a_draw_is_distinct_from_the_users_own_lists_and_weighs_what_it_stands_for(seed, strength):
    users = torch.tensor([4, 1, 0, 2, 3, 0])
    positives = torch.tensor([22, 4, 9, 2, 5, 1])
    drawn = own_of(strength=strength).draw(users, positives, generator("cpu", seed))
    assert drawn.item_idx.shape == drawn.log_weights.shape == (6, 5)
    for row, user in enumerate(users.tolist()):
        for part, lists, count, more in (
            (slice(0, 3), LISTS, 3, 1.0),
            (slice(3, 5), REFUSED, 2, 2.5),
        ):
            items, weights = drawn.item_idx[row, part], drawn.log_weights[row, part]
            here = weights > -math.inf
            found, whole = items[here].tolist(), lists[user]
            assert len(found) == min(count, len(whole))
            assert len(set(found)) == len(found)
            assert set(found) <= set(whole)
            # What is not there stands for the positive, which is encoded anyway.
            assert (items[~here] == positives[row]).all()
            if found:
                told = math.log(more) + strength * math.log(len(whole) / len(found))
                torch.testing.assert_close(weights[here], torch.full((len(found),), told))


def test_every_place_of_a_list_is_drawn_alike():
    users, trials = torch.zeros(4000, dtype=torch.int64), 5
    counts = torch.zeros(NUM_ITEMS)
    for trial in range(trials):
        drawn = own_of(explicit=False).draw(users, users, generator("cpu", 3, trial))
        counts += torch.bincount(drawn.item_idx.flatten(), minlength=NUM_ITEMS)
    share, total = 3 / 7, 4000 * trials
    spread = 4.5 * math.sqrt(total * share * (1 - share))
    assert (counts[LISTS[0]] - total * share).abs().max() < spread
    assert int(counts.sum()) == 3 * total


def test_a_draw_takes_one_of_each_stretch_of_the_list():
    """Systematic: of a list of nine by three, one of the first three, and so on."""
    own = own_of(explicit=False)
    own.mined = torch.arange(9).int().expand(NUM_USERS, -1)
    for seed in range(50):
        drawn = own.draw(torch.tensor([2]), torch.tensor([0]), generator("cpu", seed))
        assert (drawn.item_idx // 3).tolist() == [[0, 1, 2]]


def test_draws_follow_from_the_generator():
    users, positives = torch.tensor([0, 4]), torch.tensor([1, 22])
    first, again, *others = (
        own_of().draw(users, positives, generator("cpu", seed)).item_idx.tolist()
        for seed in (1, 1, 2, 3, 4)
    )
    assert first == again
    assert any(first != other for other in others)


def test_lists_that_are_missing_or_of_other_users_are_refused():
    sources = NegativesSettings(in_batch=True, explicit=EXPLICIT)
    with pytest.raises(ConfigError, match=r"negatives\.explicit needs"):
        OwnNegatives(LOG, sources)
    with pytest.raises(ShapeError, match="expected 6 rows"):
        OwnNegatives(LOG, sources, explicit=csr_of(REFUSED[:-1]))
    with pytest.raises(ShapeError, match=r"expected mined items \(6, 7\)"):
        own_of().refill(table_of(LISTS[:-1]))
    # Nobody refused anything.
    own = OwnNegatives(LOG, sources, explicit=csr_of([[]] * NUM_USERS))
    drawn = own.draw(torch.tensor([0, 3]), torch.tensor([1, 5]), generator("cpu", 1))
    assert drawn.item_idx.tolist() == [[1, 1], [5, 5]]
    assert (drawn.log_weights == -math.inf).all()


def test_without_either_there_is_nothing():
    own = own_of(mined=False, explicit=False)
    assert not own
    assert own.state() == {}
    assert own.draw(torch.tensor([0]), torch.tensor([1]), generator("cpu", 1)) is None


@pytest.mark.parametrize("only_own", [False, True])
def test_a_rows_mined_items_are_masked_among_the_shared_candidates(only_own):
    known = KnownPositives(LOG, only_own=only_own)
    users, positives = torch.tensor([4, 1, 0, 2, 0]), torch.tensor([22, 4, 9, 2, 1])
    candidates = torch.tensor([0, 3, 4, 6, 9, 10, 11, 21, 22])
    found = known.mask(users, positives, candidates, also=table_of(LISTS))
    expected = [
        (row, column)
        for row, user in enumerate(users.tolist())
        for column, item in enumerate(candidates.tolist())
        if item in LISTS[user] or item in ({int(positives[row])} if only_own else KNOWN[user])
    ]
    pairs = list(zip(found.rows.tolist(), found.columns.tolist(), strict=True))
    assert sorted(pairs) == expected
    assert found.rows.tolist() == sorted(found.rows.tolist())
    assert (known.item_slots == -1).all()


# --- in the objective -----------------------------------------------------------------------------


def model_of(loss, dim=4):
    return build_model(
        Prepared(LOG, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS)),
        user=TowerSettings(),
        item=TowerSettings(),
        model=ModelSettings(embedding_dim=dim),
        loss=loss,
        seed=1,
    ).train()


def objective_of(loss, *, mined=True, explicit=True, lists=LISTS, **sources):
    negatives = NegativesSettings(
        mined=MINED if mined else None, explicit=EXPLICIT if explicit else None, **sources
    )
    objective = Objective(LOG, loss, negatives, seed=3, explicit=csr_of(REFUSED))
    if mined:
        objective.own.refill(table_of(lists))
    return objective


BATCH = Batch(USERS[2:12].clone(), ITEMS[2:12].clone(), None, None, None, None)


def logits_of(model):
    users, items = (vectors.double() for vectors in model.all_vectors(None))
    return users[:-1] @ items.T / float(model.temperature().detach())


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize(("mined", "explicit"), [(True, False), (False, True), (True, True)])
def test_a_step_equals_the_loop(in_batch, strength, mined, explicit):
    loss = LossSettings(temperature=0.4, log_q_strength=strength)
    model = model_of(loss)
    objective = objective_of(loss, mined=mined, explicit=explicit, in_batch=in_batch, uniform=6)
    found = objective(model, BATCH, 7)
    drawn = objective._own_draws(BATCH, 7)
    candidates = objective._candidates(BATCH, 7, drawn)
    plain = objective_of(loss, mined=False, explicit=False, in_batch=in_batch, uniform=6)
    # What a row has for itself changes nothing for the others.
    without = plain._candidates(BATCH, 7)
    assert candidates.candidate_idx.tolist() == without.candidate_idx.tolist()
    torch.testing.assert_close(candidates.log_weights, without.log_weights)
    assert torch.equal(candidates.item_idx[candidates.positive_row], BATCH.item_idx)
    logits, total, num_masked = logits_of(model), 0.0, 0
    for row, (user, item) in enumerate(
        zip(BATCH.user_idx.tolist(), BATCH.item_idx.tolist(), strict=True)
    ):
        hidden = KNOWN[user] | (set(LISTS[user]) if mined else set())
        partition = math.exp(logits[user, item])
        for candidate, weight in zip(
            candidates.candidate_idx.tolist(), candidates.log_weights.tolist(), strict=True
        ):
            num_masked += candidate in hidden
            if candidate not in hidden:
                partition += math.exp(logits[user, candidate] + weight)
        for own, weight in zip(
            drawn.item_idx[row].tolist(), drawn.log_weights[row].tolist(), strict=True
        ):
            partition += math.exp(logits[user, own] + weight)
        total += math.log(partition) - float(logits[user, item])
    assert float(found.loss.detach()) == pytest.approx(total / len(BATCH.user_idx), abs=1e-5)
    assert found.num_masked == num_masked
    found.loss.backward()
    for each in model.tables().values():
        assert all(look.vectors.grad.isfinite().all() for look in each.lookups)


def test_explicit_negatives_join_a_full_softmax():
    loss = LossSettings(temperature=0.4, kind="full_softmax")
    model, objective = model_of(loss), objective_of(loss, mined=False)
    found = float(objective(model, BATCH, 2).loss.detach())
    drawn, logits, total = objective._own_draws(BATCH, 2), logits_of(model), 0.0
    for row, (user, item) in enumerate(
        zip(BATCH.user_idx.tolist(), BATCH.item_idx.tolist(), strict=True)
    ):
        others = [i for i in range(NUM_ITEMS) if i not in KNOWN[user]]
        partition = sum(math.exp(logits[user, i]) for i in [item, *others])
        for own, weight in zip(
            drawn.item_idx[row].tolist(), drawn.log_weights[row].tolist(), strict=True
        ):
            partition += math.exp(logits[user, own] + weight)
        total += math.log(partition) - float(logits[user, item])
    assert found == pytest.approx(total / len(BATCH.user_idx), abs=1e-5)


def sums_of(objective, logits, steps, user=0, item=9):
    """What each step puts in the denominator of a row beside its positive, float64 [steps]."""
    one = Batch(torch.tensor([user]), torch.tensor([item]), None, None, None, None)
    found = []
    for step in range(steps):
        drawn = objective._own_draws(one, step)
        candidates = objective._candidates(one, step, drawn)
        mask = objective._masked(one.user_idx, one.item_idx, candidates)[0]
        weights = candidates.log_weights.double().exp()
        weights[mask.columns] = 0.0
        total = (weights * logits[user, candidates.candidate_idx].exp()).sum()
        if drawn is not None:
            total += (drawn.log_weights.double() + logits[user, drawn.item_idx]).exp().sum()
        found.append(float(total))
    return torch.tensor(found, dtype=torch.float64)


def planted_logits(hard):
    """Some items score high for user 0: those that were mined for them."""
    draws = torch.Generator().manual_seed(5)
    logits = 0.3 * torch.randn(NUM_USERS, NUM_ITEMS, generator=draws).double()
    logits[0, LISTS[0]] = hard
    return logits


@pytest.mark.parametrize("explicit", [False, True])
def test_the_sum_is_that_over_all_items_on_average(explicit):
    logits = planted_logits(0.2 * torch.arange(len(LISTS[0]), 0, -1).double())
    objective = objective_of(
        LossSettings(),
        explicit=explicit,
        in_batch=False,
        uniform=5,
        popularity=PopularitySettings(count=2),
    )
    found = sums_of(objective, logits, 400)
    others = [item for item in range(NUM_ITEMS) if item not in KNOWN[0]]
    whole = float(logits[0, others].exp().sum())
    if explicit:
        whole += EXPLICIT.weight * float(logits[0, REFUSED[0]].exp().sum())
    error = float(found.std()) / math.sqrt(len(found))
    assert error < 0.04 * whole
    assert abs(float(found.mean()) - whole) < 4.5 * error


def test_the_sum_varies_less_than_by_uniform_draws_of_equal_number():
    logits = planted_logits(5.0)
    mined = objective_of(LossSettings(), explicit=False, in_batch=False, uniform=5)
    uniform = objective_of(
        LossSettings(), mined=False, explicit=False, in_batch=False, uniform=5 + MINED.count
    )
    few, many = (float(sums_of(each, logits, 200).std()) for each in (mined, uniform))
    # Seven equal items are nearly all of the sum: three of them say all about it.
    assert few < many / 20


def test_before_the_first_mining_a_step_is_that_without():
    loss = LossSettings(temperature=0.4)
    empty = objective_of(loss, explicit=False, lists=[[]] * NUM_USERS)
    plain = objective_of(loss, explicit=False, mined=False)
    found, expected = (each(model_of(loss), BATCH, 3) for each in (empty, plain))
    torch.testing.assert_close(found.loss.detach(), expected.loss.detach())
    assert found.num_masked == expected.num_masked


def test_a_list_no_longer_than_the_draw_is_taken_whole():
    """Three of three: nothing is left to chance."""
    drawn = own_of(explicit=False).draw(torch.tensor([4]), torch.tensor([22]), generator("cpu", 0))
    assert sorted(drawn.item_idx[0].tolist()) == LISTS[4]
    assert (drawn.log_weights == 0).all()


def test_what_limits_shared_candidates_limits_those_of_a_row():
    groups = torch.arange(NUM_ITEMS) % 3
    sources = NegativesSettings(in_batch=True, mined=MINED, explicit=EXPLICIT, within="kind")
    objective = Objective(
        LOG, LossSettings(), sources, seed=3, explicit=csr_of(REFUSED), item_group=groups
    )
    objective.own.refill(table_of(LISTS))
    positives = torch.tensor([1, 4, 9])
    batch = Batch(torch.tensor([0, 0, 0]), positives, None, None, None, None)
    drawn = objective._own_draws(batch, 5)
    alive = drawn.log_weights > -math.inf
    for row, positive in enumerate(positives.tolist()):
        for place, item in enumerate(drawn.item_idx[row].tolist()):
            same = groups[positive] == 0 or groups[positive] == groups[item]
            # The positive itself stands where there was nothing to draw.
            assert bool(alive[row, place]) == (bool(same) and item != positive)
    assert 0 < alive.sum() < alive.numel()
