"""Candidates: who is drawn, how often, and what the correction expects of it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.data.log import EncodedLog
from recclr.errors import ConfigError
from recclr.negatives import CandidateSampler, lost_negatives, require_negatives
from recclr.order import generator
from recclr.settings import LossSettings, NegativesSettings, PopularitySettings, TrainSettings

COUNTS = [0, 1, 2, 5, 12, 3, 7]
NUM_ITEMS = len(COUNTS)


def planted():
    items = torch.arange(NUM_ITEMS).repeat_interleave(torch.tensor(COUNTS))
    users = torch.arange(len(items)) % 4
    return EncodedLog(users.int(), items.int(), 4, NUM_ITEMS)


def in_batch_and(options):
    return NegativesSettings(**{"in_batch": True} | options)


def sampler(strength=1.0, **settings):
    return CandidateSampler(planted(), in_batch_and(settings), log_q_strength=strength)


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


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("pool", [None, torch.tensor([1, 1, 6, 4, 2, 2], dtype=torch.int32)])
# Fewer draws and positives than there are items, and more.
@pytest.mark.parametrize(("uniform", "size"), [(1, 6), (5, NUM_ITEMS)])
def test_at_a_fixed_shape_the_same_candidates_come_with_spare_places(in_batch, pool, uniform, size):
    settings = {"in_batch": in_batch, "uniform": uniform}
    settings |= {"popularity": PopularitySettings(count=1)}
    log = planted()
    loose = CandidateSampler(log, in_batch_and(settings), log_q_strength=0.7)
    fixed = CandidateSampler(
        log,
        in_batch_and(settings),
        log_q_strength=0.7,
        fixed_shapes=True,
    )
    positives = torch.tensor([4, 4, 1, 6])
    counts = None if pool is None else (pool, len(pool))
    for seed in range(30):
        drawn, padded = (
            each.draw(positives, generator("cpu", seed), in_batch_counts=counts)
            for each in (loose, fixed)
        )
        num_items = len(drawn.item_idx)
        assert padded.candidate_row is None
        assert padded.item_idx.shape == padded.places.shape == padded.log_weights.shape == (size,)
        assert torch.equal(padded.item_idx[:num_items], drawn.item_idx)
        assert (padded.item_idx[num_items:] == drawn.item_idx[-1]).all()
        assert torch.equal(padded.places, torch.arange(size).clamp(max=num_items - 1))
        assert torch.equal(padded.positive_row, drawn.positive_row)
        alive = padded.log_weights > -torch.inf
        assert torch.equal(padded.item_idx[alive], drawn.candidate_idx)
        assert torch.equal(padded.log_weights[alive], drawn.log_weights)


def test_without_in_batch_a_positive_is_a_candidate_only_where_it_was_drawn():
    source = sampler(in_batch=False, uniform=2)
    positives = torch.tensor([4, 1, 6])
    for seed in range(20):
        found = source.draw(positives, generator("cpu", seed))
        drawn = torch.randint(NUM_ITEMS, (2,), generator=generator("cpu", seed))
        assert torch.equal(found.candidate_idx, torch.unique(drawn))
        assert torch.equal(found.item_idx[found.positive_row], positives)
        assert len(found.log_weights) == len(found.candidate_idx)


@given(
    seed=st.integers(0, 1000),
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    batch_size=st.integers(1, 14),
    in_batch=st.booleans(),
    uniform=st.integers(0, 9),
    popular=st.integers(0, 7),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    strength=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=100, deadline=None)
def test_a_candidate_weighs_its_draws_over_their_expected_number(
    seed, counts, batch_size, in_batch, uniform, popular, alpha, strength
):
    if not (in_batch or uniform or popular):
        in_batch = True
    rows = [item for item, count in enumerate(counts) for _ in range(count)]
    items = torch.tensor(rows)
    log = EncodedLog(torch.zeros(len(rows)).int(), items.int(), 1, len(counts))
    popularity = PopularitySettings(count=popular, alpha=alpha) if popular else None
    options = NegativesSettings(in_batch=in_batch, uniform=uniform, popularity=popularity)
    source = CandidateSampler(log, options, log_q_strength=strength)
    positives = items[torch.randperm(len(rows), generator=generator("cpu", seed))[:batch_size]]
    found = source.draw(positives, generator("cpu", seed, 1))
    drawn = source._draws(generator("cpu", seed, 1), positives.device).tolist()
    assert len(drawn) == uniform + popular
    assert found.item_idx.tolist() == sorted({*drawn, *positives.tolist()})
    assert torch.equal(found.item_idx[found.positive_row], positives)
    candidates = drawn + positives.tolist() * in_batch
    assert found.candidate_idx.tolist() == sorted(set(candidates))
    power = [count**alpha if count else 0.0 for count in counts]
    for item, log_weight in zip(
        found.candidate_idx.tolist(), found.log_weights.tolist(), strict=True
    ):
        expected = uniform / len(counts) + popular * power[item] / sum(power)
        if in_batch and len(rows) > 1:
            expected += (len(positives) - 1) * counts[item] / (len(rows) - 1)
        if expected == 0.0:
            # Its only draw is the positive of a batch of one, which is masked.
            assert len(positives) == 1
            assert math.isfinite(log_weight)
            continue
        told = math.log(candidates.count(item)) - strength * math.log(expected)
        assert log_weight == pytest.approx(told, abs=1e-5)


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


def assert_frequencies(drawn, shares):
    """Counts of independent draws, each within 4.5 standard deviations."""
    total = int(drawn.sum())
    spread = 4.5 * (total * shares * (1 - shares)).sqrt()
    assert ((drawn - total * shares).abs() <= spread).all()


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
def test_popularity_draws_follow_train_counts_to_the_power_alpha(alpha):
    source = sampler(
        in_batch=False, uniform=0, popularity=PopularitySettings(count=20_000, alpha=alpha)
    )
    drawn = torch.bincount(source._draws(generator("cpu", 5), torch.device("cpu")), minlength=7)
    power = torch.tensor([count**alpha if count else 0.0 for count in COUNTS]).double()
    assert drawn[0] == 0  # never in train
    assert_frequencies(drawn, power / power.sum())


def test_uniform_draws_reach_every_item_alike():
    source = sampler(in_batch=False, uniform=20_000)
    drawn = torch.bincount(source._draws(generator("cpu", 6), torch.device("cpu")), minlength=7)
    assert_frequencies(drawn, torch.full((NUM_ITEMS,), 1 / NUM_ITEMS, dtype=torch.float64))


def test_a_rounding_error_draws_no_item_that_train_never_saw():
    items = torch.tensor([1, 1, 3])
    log = EncodedLog(torch.arange(3).int(), items.int(), 3, 6)
    options = NegativesSettings(
        in_batch=False, uniform=0, popularity=PopularitySettings(count=500, alpha=1.0)
    )
    source = CandidateSampler(log, options)
    # Sums that end far below 1 instead of a hair.
    source.cumulative = source.cumulative * 0.5
    found = source.draw(items, generator("cpu", 1))
    assert found.candidate_idx.tolist() == [1, 3]
    assert found.log_weights.abs().max() < 2


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


def log_of(items, num_items):
    return EncodedLog(torch.arange(len(items)).int(), torch.tensor(items).int(), 9, num_items)


POPULAR = PopularitySettings(count=3)


@pytest.mark.parametrize(
    ("items", "num_items", "batch_size", "options", "message"),
    [
        ([2, 2], 3, None, {"uniform": 0}, "at least 2 items to choose from, found 1"),
        ([2, 2], 3, None, {"uniform": 0, "popularity": POPULAR}, "at least 2 items"),
        ([0, 0], 1, None, {"uniform": 4}, "at least 2 items"),
        ([2], 3, None, {"uniform": 0}, "at least 2 rows, found 1"),
        ([1, 2, 0], 3, 1, {"uniform": 0}, "train.batch_size"),
    ],
)
def test_settings_that_leave_no_negative_are_refused(
    items, num_items, batch_size, options, message
):
    with pytest.raises(ConfigError, match=message):
        require_negatives(
            in_batch_and(options),
            log_of(items, num_items),
            batch_size=batch_size,
        )


@pytest.mark.parametrize(
    ("items", "batch_size", "options"),
    [
        ([2, 2], None, {"uniform": 1}),
        ([1, 2], 2, {"uniform": 0}),
        ([1, 2], 1, {"uniform": 1}),
        ([1, 2], 1, {"uniform": 0, "popularity": POPULAR}),
    ],
)
def test_settings_that_leave_some_negative_are_not(items, batch_size, options):
    require_negatives(in_batch_and(options), log_of(items, 3), batch_size=batch_size)


def test_accumulation_that_loses_negatives_is_said_with_the_setting_that_keeps_them():
    train = TrainSettings(batch_size=512, accumulate=6)
    plain, in_batch, sampled = LossSettings(), NegativesSettings(in_batch=True), NegativesSettings()
    for loss, sources, lost in (
        (plain, in_batch, "meets the in-batch negatives"),
        (LossSettings(symmetric=0.3), sampled, "meets the users"),
        (LossSettings(kind="full_softmax", symmetric=0.3), sampled, "meets the users"),
        (LossSettings(kind="alignment_uniformity"), sampled, "is kept apart from the rows"),
    ):
        said = lost_negatives(loss, sources, train)
        assert f"updates of 3,072 rows, but each row {lost} of its own 512 only" in said
        assert "train.batch_size = 3072 and train.chunk_size = 512" in said
        assert lost_negatives(loss, sources, TrainSettings()) is None
    assert lost_negatives(plain, sampled, train) is None
    assert lost_negatives(LossSettings(kind="full_softmax"), in_batch, train) is None
