"""Items that were not launched yet are nobody's negatives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.availability import Availability
from recclr.batches import Batch
from recclr.building import build_model
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.errors import ConfigError
from recclr.negatives import CandidateSampler, Queued
from recclr.objective import Objective
from recclr.order import generator
from recclr.settings import (
    LossSettings,
    ModelSettings,
    NegativesSettings,
    PopularitySettings,
    TowerSettings,
    TrainSettings,
)
from recclr.statistics import TimeIndex
from recclr.stepping import Stepper

# (item, time), rising in time; items 2 and 6 have no event.
EVENTS = [(4, 10), (0, 10), (4, 13), (1, 17), (0, 17), (5, 21), (5, 22), (3, 30), (4, 31)]
NUM_ITEMS, NUM_USERS = 7, 3
FIRST = {4: 10, 0: 10, 1: 17, 5: 21, 3: 30}
COUNTS = {4: 3, 0: 2, 1: 1, 5: 2, 3: 1}
MOMENTS = [5, 10, 11, 17, 18, 25, 30, 40]


def planted():
    items, times = torch.tensor(EVENTS).T
    users = torch.arange(len(EVENTS)) % NUM_USERS
    return EncodedLog(users.int(), items.int(), NUM_USERS, NUM_ITEMS, timestamp=times.clone())


LOG = planted()


def there_at(at):
    return sorted(item for item, first in FIRST.items() if first < at)


def sampler(*, fixed_shapes=False, **options):
    options = {"available": True, **options}
    return CandidateSampler(LOG, NegativesSettings(**options), fixed_shapes=fixed_shapes)


def popular(count, alpha=0.5):
    return PopularitySettings(count=count, alpha=alpha)


def test_first_events_are_those_of_the_time_index():
    assert torch.equal(Availability(LOG).first_seen, TimeIndex.of_items(LOG).first_seen)


@pytest.mark.parametrize("at", MOMENTS)
def test_an_item_is_there_after_its_first_event(at):
    found, moment = Availability(LOG), torch.tensor(at)
    told = there_at(at)
    assert found.of(torch.arange(NUM_ITEMS), moment).nonzero().squeeze(1).tolist() == told
    assert int(found.count(moment)) == len(told)


@pytest.mark.parametrize("at", MOMENTS)
def test_with_a_lead_it_is_there_that_much_sooner(at):
    found = sampler(available_lead_d=6 / 86_400).availability
    told = there_at(at + 6)
    # Items without any event are never there.
    assert found.of(torch.arange(NUM_ITEMS), torch.tensor(at)).nonzero().squeeze(1).tolist() == told
    assert int(found.count(torch.tensor(at))) == len(told)


def test_a_lead_of_nothing_is_refused():
    with pytest.raises(ValueError, match="read with available = true"):
        NegativesSettings(in_batch=True, available_lead_d=3.0)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("at", [11, 18, 25, 40])
def test_draws_are_among_what_there_is_with_the_shares_that_are_told(at, alpha):
    source = sampler(in_batch=False, uniform=6000, popularity=popular(6000, alpha))
    moment, items = torch.tensor(at), torch.arange(NUM_ITEMS)
    drawn = source._draws(generator("cpu", at), moment.device, moment)
    there = there_at(at)
    flat = torch.tensor([1.0 if item in there else 0.0 for item in range(NUM_ITEMS)])
    power = torch.tensor([COUNTS[i] ** alpha if i in there else 0.0 for i in range(NUM_ITEMS)])
    shares = [flat / flat.sum(), power / power.sum()]
    for part, share in zip(drawn.split(6000), shares, strict=True):
        counts = torch.bincount(part, minlength=NUM_ITEMS)
        spread = 4.5 * (6000 * share * (1 - share)).sqrt()
        assert ((counts - 6000 * share).abs() <= spread).all()
    availability = source.availability
    torch.testing.assert_close(availability.uniform_share(items, moment), shares[0])
    torch.testing.assert_close(availability.popular_share(items, moment), shares[1])


@given(
    seed=st.integers(0, 500),
    at=st.sampled_from(MOMENTS),
    in_batch=st.booleans(),
    uniform=st.integers(1, 5),
    count=st.integers(0, 4),
    queue=st.integers(0, 4),
)
@settings(max_examples=40)
def test_candidates_are_a_loop_over_what_there_is(seed, at, in_batch, uniform, count, queue):
    draws = torch.Generator().manual_seed(seed)
    options = {"in_batch": in_batch, "uniform": uniform}
    options["popularity"] = popular(count) if count else None
    moment = torch.tensor(at)
    rows = torch.randperm(len(EVENTS), generator=draws)[:4]
    positives, pool = LOG.item_idx[rows].long(), LOG.item_idx[2:]
    entries = torch.randint(NUM_ITEMS, (queue,), generator=draws)
    queued = Queued(entries, torch.randn(queue, 2), queue)
    arguments = {"in_batch_counts": (pool, len(pool)), "at": moment}
    loose = sampler(**options)
    found = loose.draw(positives, generator("cpu", seed), queued=queued, **arguments)
    drawn = loose._draws(generator("cpu", seed), moment.device, moment).tolist()
    merged, there = drawn + positives.tolist() * in_batch, there_at(at)
    expected = {
        item: uniform / max(len(there), 1)
        + count * COUNTS[item] ** 0.5 / max(sum(COUNTS[i] ** 0.5 for i in there), 1)
        + in_batch * 3 / (len(pool) - 1) * float((pool == item).sum())
        + queue / len(EVENTS) * COUNTS[item]
        for item in there
    }
    told = {item: merged.count(item) / expected[item] for item in there if item in merged}
    weights = dict(zip(found.candidate_idx.tolist(), found.log_weights.exp().tolist(), strict=True))
    assert weights == pytest.approx(told, rel=1e-5)
    # Positives always stay.
    assert torch.equal(found.item_idx[found.positive_row], positives)
    kept = [item for item in entries.tolist() if item in there]
    assert found.queued.item_idx.tolist() == kept
    told = torch.tensor([1 / expected[item] for item in kept])
    torch.testing.assert_close(found.queued.log_weights.exp(), told)
    fixed = sampler(fixed_shapes=True, **options)
    padded = fixed.draw(positives, generator("cpu", seed), **arguments)
    bare = loose.draw(positives, generator("cpu", seed), **arguments)
    alive = padded.log_weights > -torch.inf
    assert torch.equal(padded.item_idx[alive], bare.candidate_idx)
    assert torch.equal(padded.log_weights[alive], bare.log_weights)


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("at", [5, 18])
def test_a_full_softmax_is_over_what_there_is(at, fixed_shapes):
    loss = LossSettings(kind="full_softmax", temperature=0.4)
    model = model_of(loss)
    objective = Objective(
        LOG,
        loss,
        NegativesSettings(in_batch=True, available=True),
        seed=1,
        fixed_shapes=fixed_shapes,
    )
    rows = torch.tensor([3, 5, 7])
    users, items = LOG.user_idx[rows].long(), LOG.item_idx[rows].long()
    batch = Batch(users, items, None, None, torch.tensor(at), LOG.item_idx)
    objective.prepare(0)
    found = objective(model, batch, 0)
    user_vectors, item_vectors = (each.double() for each in embedded(model))
    known = set(zip(LOG.user_idx.tolist(), LOG.item_idx.tolist(), strict=True))
    total, masked = 0.0, 0
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        masked += sum((user, other) in known for other in there_at(at))
        wanted = [other for other in there_at(at) if (user, other) not in known]
        scores = [float(user_vectors[user] @ item_vectors[i]) / 0.4 for i in [item, *wanted]]
        total += math.log(sum(map(math.exp, scores))) - scores[0]
    assert float(found.loss.detach()) == pytest.approx(total / 3, abs=1e-5)
    assert (int(found.num_candidates), int(found.num_masked)) == (len(there_at(at)), masked)


def model_of(loss):
    data = Prepared(LOG, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS))
    tower, settings = TowerSettings(), ModelSettings(embedding_dim=4)
    return build_model(data, user=tower, item=tower, model=settings, loss=loss, seed=1).train()


def embedded(model):
    """Vectors of all entities, of items that train never saw as well, as a step has them."""
    users, items = (
        tower.parts[0].table.weight[1:] for tower in (model.user_tower, model.item_tower)
    )
    return tuple(torch.nn.functional.normalize(each.detach()) for each in (users, items))


# a planted log: half of the items are launched after everything that is trained on


def launches():
    """Users of two tastes take items 0 to 9 of their own; 10 to 19 come at the very end."""
    draws = torch.Generator().manual_seed(3)
    users = torch.randint(20, (500,), generator=draws)
    items = 2 * torch.randint(5, (500,), generator=draws) + users % 2
    late = torch.arange(10)
    rows = torch.cat([users, late]), torch.cat([items, 10 + late])
    return EncodedLog(rows[0].int(), rows[1].int(), 20, 20, timestamp=torch.arange(510) + 9)


def trained(available):
    """Item vectors before and after, and user vectors after."""
    log, loss = launches(), LossSettings(temperature=0.3)
    data = Prepared(log, FeatureTable(20), FeatureTable(20))
    tower, size = TowerSettings(), ModelSettings(embedding_dim=6)
    model = build_model(data, user=tower, item=tower, model=size, loss=loss, seed=1)
    _, before = embedded(model)
    stepper = Stepper(
        model.train(),
        log,
        loss=loss,
        negatives=NegativesSettings(in_batch=False, uniform=16, available=available),
        train=TrainSettings(batch_size=20, epochs=2, table_lr=0.05, time_cells=True),
        seed=2,
    )
    for step in range(stepper.num_steps):
        # Only batches before the launches.
        if all(int(each.item_idx.max()) < 10 for each in stepper.source.step(step).values()):
            stepper(step)
    users, after = embedded(model)
    return before[10:], after[10:], users


def test_what_is_launched_later_is_not_pushed_away_before():
    before, after, users = trained(available=True)
    assert torch.equal(before, after)
    before, after, users = trained(available=False)
    # From all users, of either taste: it was nobody's positive.
    assert ((users @ after.T).mean(0) < (users @ before.T).mean(0)).all()
    assert ((users @ after.T).mean(0) < 0).all()


def stepper_of(log, **train):
    model = model_of(LossSettings())
    negatives = NegativesSettings(in_batch=True, available=True)
    return Stepper(
        model, log, loss=LossSettings(), negatives=negatives, train=TrainSettings(**train), seed=0
    )


def test_it_needs_time_and_time_cells():
    assert stepper_of(LOG).source.time_cells
    with pytest.raises(ConfigError, match=r"time_cells = false, but negatives\.available"):
        stepper_of(LOG, time_cells=False)
    without = EncodedLog(LOG.user_idx, LOG.item_idx, NUM_USERS, NUM_ITEMS)
    with pytest.raises(ConfigError, match="timestamps"):
        stepper_of(without)
    with pytest.raises(ConfigError, match=r"negatives\.available needs timestamps"):
        Availability(without)
