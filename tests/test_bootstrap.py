"""Intervals and paired differences against a slow loop and against normal theory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recclr.bootstrap as bootstrap_module
from recclr.bootstrap import interval_of, paired_differences, resampled_means
from recclr.errors import ShapeError
from recclr.kernels import native
from recclr.order import generator, mix


def bootstrap_interval(values, num_resamples, seed=0):
    return interval_of(resampled_means(values, num_resamples, seed=seed))


def normal_values(num_users, num_metrics, *keys):
    draws = generator("cpu", *keys)
    return torch.randn(num_users, num_metrics, generator=draws, dtype=torch.float64)


def drawn_users(num_users, num_resamples, seed):
    """Who is drawn, written out: SplitMix64 in Python's own integers."""
    mask = (1 << 64) - 1

    def scrambled(state):
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        return state ^ state >> 31

    return [
        [
            int((scrambled((key + place * 0x9E3779B97F4A7C15) & mask) >> 11) / 2**53 * num_users)
            for place in range(1, num_users + 1)
        ]
        for key in (mix(seed, 0, num_users, number) for number in range(num_resamples))
    ]


@pytest.fixture(params=["compiled", "twin"])
def kernels(request):
    if request.param == "twin":
        with native.turned_off():
            yield
        return
    if native.library() is None:
        pytest.skip(f"no compiled kernels: {native.why_not()}")
    yield


@pytest.mark.parametrize("num_users", [1, 7, 23])
def test_equals_means_of_the_drawn_users(kernels, num_users):
    values = normal_values(num_users, 3, 5)
    low, high = bootstrap_interval(values, 40, seed=9)
    # The same draws, spent one resample at a time on the values themselves.
    picks = torch.tensor(drawn_users(num_users, 40, 9))
    means = torch.stack([values[row].mean(0) for row in picks])
    for metric in range(3):
        ranked = means[:, metric].sort().values
        for bound, share in ((low, 0.025), (high, 0.975)):
            place = share * 39
            below, above = ranked[math.floor(place)], ranked[math.ceil(place)]
            expected = below + (above - below) * (place - math.floor(place))
            assert float(bound[metric]) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("num_users", [1, 63, 64, 65, 4_099, 70_001])
def test_the_kernel_draws_as_its_twin(num_users):
    if native.library() is None:
        pytest.skip(f"no compiled kernels: {native.why_not()}")
    seeds = torch.tensor([3, -(1 << 62), (1 << 63) - 1, 0, 12345])
    mine, theirs = (torch.full((5, num_users), 7.0, dtype=torch.float64) for _ in range(2))
    bootstrap_module._draw_counts(seeds, mine)
    with native.turned_off():
        bootstrap_module._draw_counts(seeds, theirs)
    assert torch.equal(mine, theirs)
    assert (mine.sum(1) == num_users).all()


def test_draws_are_uniform_and_signs_fair():
    counts = torch.empty(400, 1000, dtype=torch.float64)
    bootstrap_module._draw_counts(torch.arange(400), counts)
    # 400,000 draws over 1,000 users: chi-squared of 999 degrees, whose deviation is 44.7.
    drawn = counts.sum(0)
    assert abs(float(((drawn - 400) ** 2 / 400).sum()) - 999) < 4 * 44.7
    # Of one resample: binomial, so variance 1 - 1/U of each count.
    assert float(counts.var()) == pytest.approx(0.999, abs=4 * math.sqrt(2 / 400_000) * 1.3)
    signs = torch.empty(37, 10_001, dtype=torch.float64)
    bootstrap_module._draw_signs(torch.arange(37), signs)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / math.sqrt(signs.numel())
    assert float((signs[:-1] * signs[1:]).mean().abs()) < 4 / math.sqrt(signs.numel())
    assert float((signs[:, :-1] * signs[:, 1:]).mean().abs()) < 4 / math.sqrt(signs.numel())


def test_width_is_that_of_normal_theory():
    values = normal_values(2000, 2, 1) * torch.tensor([1.0, 5.0])
    low, high = bootstrap_interval(values, 4000, seed=2)
    width = 2 * 1.96 * values.std(0) / math.sqrt(2000)
    # The error of a 2.5 % quantile of 4000 resamples is some 3 % of its distance to the mean.
    assert torch.allclose(high - low, width, rtol=0.08)
    assert torch.allclose((high + low) / 2, values.mean(0), atol=0.05 * float(width.max()))


def test_covers_the_true_mean_in_95_of_100_samples():
    trials, users = 400, 60
    covered = torch.zeros(())
    for trial in range(trials):
        low, high = bootstrap_interval(normal_values(users, 1, 77, trial) + 3.0, 400, seed=trial)
        covered += float(low) <= 3.0 <= float(high)
    # Percentile intervals of 60 normal values cover 94 %; four standard errors of 400 trials.
    error = 4 * math.sqrt(0.94 * 0.06 / trials)
    assert abs(float(covered) / trials - 0.94) < error


def test_memory_chunks_and_company_do_not_change_an_interval(monkeypatch):
    values = normal_values(31, 4, 3)
    whole = bootstrap_interval(values, 50, seed=4)
    judged = paired_differences(values, num_resamples=50, seed=4)
    alone = bootstrap_interval(values[:, 2:3], 50, seed=4)
    assert float(alone[0]) == pytest.approx(float(whole[0][2]), abs=1e-12)
    monkeypatch.setattr(bootstrap_module, "_CHUNK_ELEMENTS", 31 * 7)
    for before, after in zip(whole, bootstrap_interval(values, 50, seed=4), strict=True):
        assert torch.allclose(before, after, atol=1e-12)
    for before, after in zip(
        judged, paired_differences(values, num_resamples=50, seed=4), strict=True
    ):
        assert after == pytest.approx(before, abs=1e-12)


def test_seed_decides():
    values = normal_values(40, 2, 6)
    first, again, other = (bootstrap_interval(values, 30, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@given(constant=st.floats(-3, 3), num_users=st.integers(1, 40))
@settings(deadline=None, max_examples=20)
def test_a_constant_has_no_uncertainty(constant, num_users):
    values = torch.full((num_users, 2), constant, dtype=torch.float64)
    low, high = bootstrap_interval(values, 10)
    assert low.tolist() == pytest.approx([constant] * 2, abs=1e-12)
    assert high.tolist() == pytest.approx([constant] * 2, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "resamples"),
    [(torch.ones(4), 10), (torch.ones(0, 3), 10), (torch.ones(4, 3), 1)],
)
def test_what_cannot_be_resampled_is_refused(values, resamples):
    with pytest.raises(ShapeError, match="resamples"):
        bootstrap_interval(values, resamples)


def exact_sign_flip(differences):
    """All 2^U sign patterns; the two-sided share of means as far from 0 as the observed one."""
    num_users = len(differences)
    patterns = torch.tensor(
        [[1 - 2 * (code >> bit & 1) for bit in range(num_users)] for code in range(2**num_users)]
    )
    means = (patterns.double() @ differences) / num_users
    return float((means.abs() >= differences.mean().abs() - 1e-12).double().mean())


@pytest.mark.parametrize("shift", [0.0, 0.4, 1.0])
def test_p_value_approaches_the_exact_sign_flip_test(shift):
    differences = normal_values(10, 1, 8) + shift
    exact = exact_sign_flip(differences[:, 0])
    num_resamples = 4000
    (found,) = paired_differences(differences, num_resamples=num_resamples)
    error = 4 * math.sqrt(exact * (1 - exact) / num_resamples) + 2 / num_resamples
    assert abs(found["p_value"] - exact) < error
    assert found["difference"] == pytest.approx(float(differences.mean()))
    assert found["low"] < found["difference"] < found["high"]


def test_p_values_are_uniform_where_nothing_differs():
    # Columns of one call are independent data, so each is a trial of its own.
    trials = 600
    differences = normal_values(80, trials, 12)
    p_values = [d["p_value"] for d in paired_differences(differences, num_resamples=999)]
    # Kolmogorov–Smirnov against the uniform; 1.63 / √n is the 1 % point.
    ranked = torch.tensor(p_values).sort().values
    places = torch.arange(1, trials + 1) / trials
    distance = float(torch.maximum(places - ranked, ranked - places + 1 / trials).max())
    assert distance < 1.63 / math.sqrt(trials)


def test_a_planted_effect_is_found_whichever_side_it_is_on():
    noise = normal_values(300, 1, 13)
    columns = torch.cat([noise + 0.5, noise - 0.5], 1)
    better, worse = paired_differences(columns, num_resamples=999)
    assert better["p_value"] == worse["p_value"] == 1 / 1000
    assert better["low"] > 0 > worse["high"]


def test_equal_rankers_have_no_difference():
    (found,) = paired_differences(torch.zeros(7, 1), num_resamples=20)
    assert found == {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
