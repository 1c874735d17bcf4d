"""Shares estimated from a stream of batches, beside a loop and beside counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.batches import Batch
from recclr.building import build_model
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.errors import ConfigError
from recclr.negatives import CandidateSampler, Queued, require_sources
from recclr.objective import Objective
from recclr.order import generator
from recclr.settings import (
    LossSettings,
    ModelSettings,
    NegativesSettings,
    QueueSettings,
    TowerSettings,
)
from recclr.streaming import StreamingShares

NUM_ITEMS = 6


def shares_of(rate=0.25, num_items=NUM_ITEMS):
    return StreamingShares(num_items, torch.device("cpu"), rate)


def loop(batches, rate):
    """Share of every item by Yi et al.'s recursion, an item and a batch at a time."""
    gap, last, times = [float(NUM_ITEMS)] * NUM_ITEMS, [0] * NUM_ITEMS, [0] * NUM_ITEMS
    seen = 0
    for batch in batches:
        for item in set(batch):
            came = batch.count(item)
            position = seen + max(place + 1 for place, each in enumerate(batch) if each == item)
            weight = max(came / (times[item] + came + 1), 1 - (1 - rate) ** came)
            gap[item] = (1 - weight) * gap[item] + weight * (position - last[item]) / came
            last[item], times[item] = position, times[item] + came
        seen += len(batch)
    return [1 / (gap[item] + (0 if times[item] else seen)) for item in range(NUM_ITEMS)]


@given(
    batches=st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=9), max_size=8),
    rate=st.sampled_from([0.05, 0.4, 1.0]),
)
@settings(max_examples=50)
def test_a_batch_at_once_is_the_loop_over_its_rows(batches, rate):
    stream = shares_of(rate)
    for batch in batches:
        stream.add(torch.tensor(batch, dtype=torch.int64))
    found = stream.shares(torch.arange(NUM_ITEMS))
    torch.testing.assert_close(found, torch.tensor(loop(batches, rate)))


def test_occurrences_one_by_one_are_the_published_recursion():
    """B <- (1 - rate)·B + rate·(t - A), A <- t, once an item came 1 / rate times."""
    stream, rate = shares_of(0.5), 0.5
    items = [2, 0, 2, 2, 1, 0, 2, 2]
    gap, last = {}, {}
    for place, item in enumerate(items, 1):
        before = float(stream.state["gap"][item])
        stream.add(torch.tensor([item]))
        if item in last:
            gap[item] = (1 - rate) * before + rate * (place - last[item])
            assert float(stream.state["gap"][item]) == pytest.approx(gap[item])
        last[item] = place
    assert sorted(gap) == [0, 2]


@pytest.mark.parametrize("batch_size", [7, 64])
def test_on_a_stationary_stream_it_agrees_with_counts_within_its_error(batch_size):
    num_items, num_rows = 40, 12_800
    share = 1 / torch.arange(1, num_items + 1).double()
    share /= share.sum()
    rows = torch.multinomial(share, num_rows, replacement=True, generator=generator("cpu", 4))
    stream = shares_of(0.01, num_items)
    for batch in rows.split(batch_size):
        stream.add(batch)
    # Relative standard error of a mean of gaps, see ``StreamingShares``.
    came = num_rows * share
    error = torch.maximum(1 / (came + 1).sqrt(), torch.tensor(0.005).sqrt())
    off = stream.shares(torch.arange(num_items)).double() / share - 1
    # In batches the mean gap is off by up to one batch's share of what it counts.
    assert (off.abs() <= 4 * error).all()
    assert abs(float(off.mean())) <= 4 * float((error**2).mean().sqrt()) / num_items**0.5


def test_it_follows_a_stream_that_changes():
    stream, draws = shares_of(0.05, 20), generator("cpu", 5)
    for low in (0, 10):
        for _ in range(100):
            stream.add(low + torch.randint(10, (32,), generator=draws))
    # Counts would say one in twenty; what comes says one in ten.
    assert float(stream.shares(torch.arange(10, 20)).mean()) == pytest.approx(0.1, rel=0.15)


def test_an_item_never_seen_is_rarer_the_longer_it_stays_away():
    stream = shares_of()
    everything = torch.arange(NUM_ITEMS)
    assert torch.equal(stream.shares(everything), torch.full((NUM_ITEMS,), 1 / NUM_ITEMS))
    stream.add(torch.tensor([1, 1, 1, 2]))
    assert float(stream.shares(torch.tensor([5]))) == pytest.approx(1 / (NUM_ITEMS + 4))
    assert (stream.shares(everything) > 0).all()
    assert (stream.shares(everything) <= 1).all()


def log_of(num_rows=30):
    items = torch.arange(num_rows) % NUM_ITEMS
    return EncodedLog(torch.arange(num_rows).int(), items.int(), num_rows, NUM_ITEMS)


def test_the_correction_is_by_the_stream_for_batch_and_queue():
    sampler = CandidateSampler(
        log_of(), NegativesSettings(in_batch=True, uniform=0, counts="streaming")
    )
    sampler.stream.add(torch.tensor([3, 3, 1, 0]))
    share = sampler.stream.shares(torch.arange(NUM_ITEMS))
    positives = torch.tensor([3, 1, 1, 5])
    queued = Queued(torch.tensor([2, 3]), torch.zeros(2, 4), 2)
    bare = sampler.draw(positives, generator("cpu", 0))
    draws = torch.tensor([2.0, 1.0, 1.0])
    torch.testing.assert_close(bare.log_weights, (draws / (3 * share[[1, 3, 5]])).log())
    both = sampler.draw(positives, generator("cpu", 0), queued=queued)
    torch.testing.assert_close(both.log_weights, (draws / (5 * share[[1, 3, 5]])).log())
    torch.testing.assert_close(both.queued.log_weights, -(5 * share[[2, 3]]).log())


def test_it_is_state_and_learns_from_each_batch_after_it_was_corrected():
    negatives = NegativesSettings(in_batch=True, uniform=0, counts="streaming")
    objective = Objective(log_of(), LossSettings(), negatives, seed=0)
    data = Prepared(log_of(), FeatureTable(30), FeatureTable(NUM_ITEMS))
    tower, size = TowerSettings(), ModelSettings(embedding_dim=4)
    model = build_model(data, user=tower, item=tower, model=size, loss=LossSettings(), seed=1)
    rows = torch.tensor([4, 9, 2, 10])
    batch = Batch(rows, rows % NUM_ITEMS, None, None, None, None)
    first = objective._candidates(batch, 0).log_weights
    objective(model, batch, 0)
    # Before the first batch all items are alike.
    told = (torch.tensor([1.0, 1.0, 2.0]) / (3 / NUM_ITEMS)).log()
    assert sorted(first.tolist()) == pytest.approx(sorted(told.tolist()))
    assert int(objective.state["stream/rows"]) == 4
    assert objective.state["stream/times"].tolist() == [0, 0, 1, 1, 2, 0]
    assert not torch.equal(objective._candidates(batch, 0).log_weights, first)


def test_settings_that_leave_nothing_to_estimate_are_refused():
    with pytest.raises(ValueError, match="counts = 'streaming' is about positives"):
        NegativesSettings(in_batch=False, counts="streaming")
    NegativesSettings(in_batch=False, counts="streaming", queue=QueueSettings())
    streaming = NegativesSettings(in_batch=True, counts="streaming")
    with pytest.raises(ConfigError, match="the batches are time cells"):
        require_sources(streaming, time_cells=True)
    require_sources(streaming, time_cells=False)
