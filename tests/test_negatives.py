"""Candidates: who is drawn, how often, and what the correction expects of it."""

import math

import pytest
import torch

from recclr.data.log import EncodedLog
from recclr.errors import ConfigError
from recclr.negatives import CandidateSampler, require_negatives
from recclr.order import generator
from recclr.settings import NegativesSettings, PopularitySettings

COUNTS = [0, 1, 2, 5, 12, 3, 7]
NUM_ITEMS = len(COUNTS)


def planted():
    items = torch.arange(NUM_ITEMS).repeat_interleave(torch.tensor(COUNTS))
    users = torch.arange(len(items)) % 4
    return EncodedLog(users.int(), items.int(), 4, NUM_ITEMS)


def sampler(strength=1.0, **settings):
    return CandidateSampler(planted(), NegativesSettings(**settings), log_q_strength=strength)


def expected_of(candidates, draws):
    """Expected counts, recovered from log draws - log expected."""
    return draws.float() / candidates.log_weights.exp()


def test_candidates_are_distinct_and_positives_are_found_in_them():
    positives = torch.tensor([4, 4, 1, 6])
    found = sampler(uniform=9).draw(positives, generator("cpu", 1))
    assert torch.equal(found.item_idx, torch.unique(found.item_idx))
    assert torch.equal(found.item_idx[found.positive_row], positives)
    assert found.candidate_row is None
    assert torch.equal(found.candidate_idx, found.item_idx)


def test_without_in_batch_a_positive_is_a_candidate_only_where_it_was_drawn():
    source = sampler(in_batch=False, uniform=2)
    positives = torch.tensor([4, 1, 6])
    for seed in range(20):
        found = source.draw(positives, generator("cpu", seed))
        drawn = torch.randint(NUM_ITEMS, (2,), generator=generator("cpu", seed))
        assert torch.equal(found.candidate_idx, torch.unique(drawn))
        assert torch.equal(found.item_idx[found.positive_row], positives)
        assert len(found.log_weights) == len(found.candidate_idx)


def test_expected_counts_add_up_over_sources():
    source = sampler(uniform=10, popularity=PopularitySettings(count=6, alpha=0.5))
    positives = torch.tensor([4, 4, 1, 6, 3])
    draws = generator("cpu", 3)
    found = source.draw(positives, draws)
    replay = generator("cpu", 3)
    drawn = torch.cat([source._draws(replay, positives.device), positives])
    counts = torch.bincount(drawn, minlength=NUM_ITEMS)[found.item_idx]
    power = [math.sqrt(count) for count in COUNTS]
    expected = [
        10 / NUM_ITEMS
        + 6 * power[item] / sum(power)
        + (len(positives) - 1) * COUNTS[item] / (sum(COUNTS) - 1)
        for item in found.item_idx.tolist()
    ]
    torch.testing.assert_close(expected_of(found, counts), torch.tensor(expected))


def test_expected_counts_are_those_of_a_simulation():
    source = sampler(uniform=4, popularity=PopularitySettings(count=3, alpha=0.75))
    log, batch_size, trials = planted(), 6, 4000
    # Item 4's own row is in the batch; every other item is counted.
    own = int((log.item_idx == 4).nonzero()[0])
    others = torch.tensor([row for row in range(len(log)) if row != own])
    total = torch.zeros(NUM_ITEMS)
    for trial in range(trials):
        draws = generator("cpu", 17, trial)
        rows = others[torch.randperm(len(others), generator=draws)[: batch_size - 1]]
        drawn = torch.cat([source._draws(draws, rows.device), log.item_idx[rows].long()])
        total += torch.bincount(drawn, minlength=NUM_ITEMS)
    expected = source._expected(torch.arange(NUM_ITEMS), batch_size, None)
    for item in range(NUM_ITEMS):
        if item != 4:
            # At most 12 draws: the variance of a mean count is below its value over the trials.
            spread = 4.5 * math.sqrt(float(expected[item]) / trials)
            assert abs(float(total[item] / trials - expected[item])) < spread


def test_popularity_draws_follow_train_counts_to_the_power_alpha():
    source = sampler(
        in_batch=False, uniform=0, popularity=PopularitySettings(count=20_000, alpha=0.75)
    )
    drawn = torch.bincount(source._draws(generator("cpu", 5), torch.device("cpu")), minlength=7)
    power = torch.tensor(COUNTS).double() ** 0.75
    share = power / power.sum()
    assert drawn[0] == 0  # never in train
    spread = 4.5 * (20_000 * share * (1 - share)).sqrt()
    assert ((drawn - 20_000 * share).abs() <= spread).all()


def test_strength_scales_the_correction():
    positives = torch.tensor([4, 1])
    none, half, full = (
        sampler(strength, uniform=9).draw(positives, generator("cpu", 1)).log_weights
        for strength in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(half, (none + full) / 2)
    assert torch.equal(none.exp().round(), none.exp())  # log of the number of draws


def test_a_time_cell_is_corrected_by_its_own_neighbourhood():
    pool = torch.tensor([3, 3, 3, 6])
    source = sampler(uniform=0)
    found = source._expected(torch.tensor([3, 6, 4]), 3, (pool, len(pool)))
    torch.testing.assert_close(found, torch.tensor([2 / 3 * 3, 2 / 3, 1e-12]))


def test_full_softmax_scores_every_item_with_weight_one():
    positives = torch.tensor([6, 0, 6])
    found = sampler().everything(positives)
    assert torch.equal(found.candidate_idx, torch.arange(NUM_ITEMS))
    assert torch.equal(found.positive_row, positives)
    assert torch.equal(found.log_weights, torch.zeros(NUM_ITEMS))


def test_draws_follow_from_the_generator():
    first, again, other = (
        sampler(uniform=9).draw(torch.tensor([1]), generator("cpu", seed)).item_idx
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_item_needs_another_source_than_the_batch():
    one_item = EncodedLog(torch.tensor([0, 1]).int(), torch.tensor([2, 2]).int(), 2, 3)
    with pytest.raises(ConfigError, match="at least 2 rows on 2 items"):
        require_negatives(NegativesSettings(uniform=0), one_item)
    require_negatives(NegativesSettings(uniform=1), one_item)
    require_negatives(NegativesSettings(uniform=0), planted())
