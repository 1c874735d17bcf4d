"""Popularity by a loop over the log, and the list that everybody is shown."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.baselines.popularity import PopularityRanker, popularity, recency
from recclr.data.log import Csr
from recclr.topk import top_k_of_scores


@pytest.mark.parametrize("half_life_d", [None, 0.5, 20.0])
@pytest.mark.parametrize("with_weights", [True, False])
def test_equals_a_loop_over_the_log(random_prepared, half_life_d, with_weights):
    prepared = random_prepared(1, with_weights=with_weights)
    log = prepared.train
    expected = [0.0] * log.num_items
    for row in range(len(log)):
        weight = float(log.weight[row]) if with_weights else 1.0
        if half_life_d is not None:
            age_d = (prepared.cutoff - int(log.timestamp[row])) / 86_400
            weight *= 0.5 ** (age_d / half_life_d)
        expected[int(log.item_idx[row])] += weight
    found = popularity(log, prepared.cutoff, half_life_d)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_without_times_nothing_is_recent(random_prepared):
    log = random_prepared(1, with_time=False).train
    assert torch.equal(popularity(log, None, 3.0), popularity(log, None, None))


def test_an_event_counts_half_after_the_half_life():
    cutoff, day = 1_000_000_000, 86_400
    times = torch.tensor([cutoff, cutoff - 3 * day, cutoff - 6 * day])
    assert recency(times, cutoff, 3.0).tolist() == [1.0, 0.5, 0.25]


def test_recency_tells_apart_what_float32_could_not():
    # A list of old items, whose weights are all 0 in float32.
    scores = torch.tensor([1e-300, 3e-300, 2e-300], dtype=torch.float64)
    assert PopularityRanker("x", scores).top_k(torch.tensor([0]), 3).item_idx.tolist() == [
        [1, 2, 0]
    ]


@given(
    seed=st.integers(0, 1000),
    num_items=st.integers(1, 40),
    k=st.integers(1, 50),
    with_items=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_equals_a_sort_of_the_scores_with_many_ties(seed, num_items, k, with_items):
    draws = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (num_items,), generator=draws).float()
    rows = torch.arange(5).repeat_interleave(torch.randint(0, 9, (5,), generator=draws))
    values = torch.randint(0, num_items, (len(rows),), generator=draws)
    seen = Csr.from_pairs(rows, values, 5)
    items = None
    if with_items:
        items = (torch.rand(num_items, generator=draws) < 0.6).nonzero().squeeze(1)
    found = PopularityRanker("x", scores).top_k(torch.arange(5), k, seen=seen, items=items)
    expected = top_k_of_scores(scores.expand(5, -1), k, seen=seen, items=items)
    assert torch.equal(found.item_idx, expected.item_idx)
