"""Counter-based order: bijections, keys, no memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from recclr.order import generator, keyed_uniform, mix, permuted, scrambled


@given(size=st.integers(1, 700), keys=st.lists(st.integers(0, 1 << 40), max_size=3))
@settings(max_examples=150, deadline=None)
def test_every_row_comes_once(size, keys):
    found = permuted(torch.arange(size), size, *keys)
    assert torch.equal(found.sort().values, torch.arange(size))


@pytest.mark.parametrize("size", [10_007, 65_536, 999_983])
def test_large_sizes_and_single_positions(size):
    whole = permuted(torch.arange(size), size, 4, 2)
    assert torch.equal(whole.sort().values, torch.arange(size))
    some = torch.tensor([size - 1, 0, size // 3])
    assert torch.equal(permuted(some, size, 4, 2), whole[some])


@given(size=st.integers(32, 3000), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_detours_worked_out_ahead_are_the_walks(size, seed):
    positions = torch.arange(size)
    ahead = permuted(positions, size, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recclr.order._MAX_DETOURS", -1)
        assert torch.equal(permuted(positions, size, seed), ahead)


def test_keys_name_the_permutation():
    size = 501
    orders = {tuple(permuted(torch.arange(size), size, 7, e).tolist()) for e in range(20)}
    assert len(orders) == 20
    assert torch.equal(
        permuted(torch.arange(size), size, 7, 3), permuted(torch.arange(size), size, 7, 3)
    )


def test_few_rows_come_in_every_order():
    orders = {tuple(permuted(torch.arange(4), 4, 7, epoch).tolist()) for epoch in range(400)}
    assert len(orders) == 24


def test_order_is_spread_like_a_shuffle():
    # Mean |row - position| of a random order is size / 3; its standard deviation over shuffles is
    # about sqrt(2 size / 45), far below the slack.
    size = 30_011
    distance = (permuted(torch.arange(size), size, 9) - torch.arange(size)).abs().double().mean()
    assert abs(float(distance) - size / 3) < 0.02 * size


def test_mix_depends_on_every_key_and_their_order():
    values = {mix(), mix(0), mix(1), mix(0, 1), mix(1, 0), mix(0, 0), mix(-1), mix(1 << 70)}
    assert len(values) >= 7  # 2^70 is cut to 64 bits and may stand for 0
    assert all(0 <= value < 1 << 63 for value in values)


def test_generators_of_equal_keys_draw_alike():
    first, again, other = (torch.rand(5, generator=generator("cpu", 3, k)) for k in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@given(
    size=st.integers(1, (1 << 60) - 1),
    seed=st.integers(0, 1 << 40),
    shares=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_sizes_up_to_the_limit_stay_in_range_and_distinct(size, seed, shares):
    positions = sorted({min(int(share * size), size - 1) for share in shares} | {0, size - 1})
    found = permuted(torch.tensor(positions), size, seed).tolist()
    assert all(0 <= row < size for row in found)
    assert len(set(found)) == len(positions)


def test_every_two_rows_share_a_batch_as_often_as_in_a_uniform_draw():
    # The expected counts of in-batch negatives rest on this.
    size, batch_size, epochs = 100, 10, 1500
    together = torch.zeros(size, size)
    for epoch in range(epochs):
        batches = permuted(torch.arange(size), size, 7, epoch).view(-1, batch_size)
        number = torch.empty(size, dtype=torch.int64)
        number[batches.flatten()] = torch.arange(size) // batch_size
        together += number[:, None] == number
    rate = (batch_size - 1) / (size - 1)
    pairs = together[tuple(torch.triu_indices(size, size, 1))].double()
    scores = (pairs - epochs * rate) / (epochs * rate * (1 - rate)) ** 0.5
    assert scores.abs().max() < 5
    # Over 4950 pairs the mean square of standard scores is 1 ± 0.02.
    assert float(scores.square().mean()) == pytest.approx(1, abs=0.1)


def split_mix(seed, position):
    """The draw at a position of the stream, in Python's integers."""
    mask = (1 << 64) - 1
    state = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return ((state ^ (state >> 31)) >> 40) / 2**24


@given(seed=st.integers(-(1 << 63), (1 << 63) - 1), position=st.integers(-(1 << 40), (1 << 40)))
@settings(max_examples=150)
def test_keyed_draws_are_the_stream_of_their_seed(seed, position):
    found = keyed_uniform(torch.tensor([seed]), torch.tensor([[position], [position + 1]]))
    assert found.dtype == torch.float32
    assert found[:, 0].tolist() == [split_mix(seed, position), split_mix(seed, position + 1)]


def test_keyed_draws_are_uniform_and_apart():
    seeds = torch.arange(300)
    found = keyed_uniform(seeds[:, None], torch.arange(400))
    assert kstest(found.flatten().numpy(), "uniform").pvalue > 1e-6
    for one, other in ((found[1:], found[:-1]), (found[:, 1:], found[:, :-1])):
        assert (
            abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.02
        )


def test_scrambled_numbers_stay_apart():
    values = torch.cat([torch.arange(5000), -torch.arange(1, 5000), torch.tensor([1 << 62])])
    assert len(scrambled(values).unique()) == len(values)
