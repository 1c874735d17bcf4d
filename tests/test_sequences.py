"""Histories cropped, masked and reordered, against loops over their rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from recclr.order import keyed_uniform
from recclr.sequences import Shuffle, cropped


def seeds_of(count, seed=0):
    return torch.randint(1 << 62, (count,), generator=torch.Generator().manual_seed(seed))


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def is_rate(hits, trials, rate):
    return binomtest(hits, trials, rate).pvalue > 1e-6


lengths_of = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(lengths=lengths_of, keep=st.floats(0.05, 1.0), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_a_crop_is_a_stretch_of_the_share_that_is_kept(lengths, keep, seed):
    offsets = offsets_of(lengths)
    start, stop = cropped(offsets[:-1], offsets[1:], keep, seeds_of(len(lengths), seed))
    for row, length in enumerate(lengths):
        assert offsets[row] <= start[row] <= stop[row] <= offsets[row + 1]
        assert stop[row] - start[row] == math.ceil(length * keep - 1e-9)
        assert (stop[row] > start[row]) == (length > 0)


def test_a_crop_begins_anywhere_alike_and_keeping_all_keeps_all():
    count = 4000
    start, stop = torch.full((count,), 30), torch.full((count,), 40)
    found, ends = cropped(start, stop, 0.7, seeds_of(count))
    assert (ends - found == 7).all()
    counts = (found - 30).bincount()
    assert len(counts) == 4
    assert chisquare(counts).pvalue > 1e-6
    same = cropped(start, stop, 1.0, seeds_of(count))
    assert torch.equal(torch.stack(same), torch.stack([start, stop]))


def loop(weights, seed, *, mask, reorder):
    """One history, item by item."""
    length = len(weights)
    span = math.floor(length * reorder + 1e-9)

    def drawn(position):
        return float(keyed_uniform(torch.tensor([seed]), torch.tensor([position])))

    begin = min(int(drawn(-3) * (length - span + 1)), length - span)
    places = range(begin, begin + span)
    order = sorted(places, key=lambda place: drawn((1 << 32) + place))
    shuffled = [*weights[:begin], *(weights[place] for place in order), *weights[begin + span :]]
    return [w if drawn(place) >= mask else 0.0 for place, w in enumerate(shuffled)]


@given(
    lengths=lengths_of,
    mask=st.sampled_from([0.0, 0.3]),
    reorder=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_ragged_and_padded_weights_equal_the_loop(lengths, mask, reorder, seed):
    seeds, offsets = seeds_of(len(lengths), seed), offsets_of(lengths)
    weights = torch.rand(int(offsets[-1]), generator=torch.Generator().manual_seed(seed))
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    shuffle = Shuffle(mask, reorder)
    flat = shuffle.flat(weights, offsets, owner, seeds)
    grid = torch.full((len(lengths), 9), 7.0)
    for row, length in enumerate(lengths):
        grid[row, :length] = weights[offsets[row] : offsets[row + 1]]
    padded = shuffle.padded(grid, torch.tensor(lengths), seeds)
    for row, length in enumerate(lengths):
        own = slice(int(offsets[row]), int(offsets[row + 1]))
        expected = loop(weights[own].tolist(), int(seeds[row]), mask=mask, reorder=reorder)
        assert flat[own].tolist() == expected
        assert padded[row, :length].tolist() == expected
        assert set(padded[row, length:].tolist()) <= {7.0, 0.0}


@pytest.mark.parametrize("length", [1, 6])
def test_items_are_left_out_at_the_rate(length):
    weights = torch.ones(3000, length)
    found = Shuffle(0.35, 0.0).padded(weights, torch.full((3000,), length), seeds_of(3000))
    assert is_rate(int((found == 0).sum()), found.numel(), 0.35)


def test_a_whole_history_comes_in_every_order_alike():
    weights = torch.tensor([1.0, 2.0, 3.0]).expand(6000, 3).contiguous()
    found = Shuffle(0.0, 1.0).padded(weights, torch.full((6000,), 3), seeds_of(6000))
    assert torch.equal(found.sort(1).values, weights)
    counts = (found @ torch.tensor([100.0, 10.0, 1.0])).unique(return_counts=True)[1]
    assert len(counts) == 6
    assert chisquare(counts).pvalue > 1e-6


def test_half_of_a_history_is_one_stretch_that_begins_anywhere():
    weights = torch.arange(8.0).expand(4000, 8).contiguous()
    found = Shuffle(0.0, 0.5).padded(weights, torch.full((4000,), 8), seeds_of(4000))
    moved = found != weights
    places = torch.arange(8)
    first = torch.where(moved, places, 8).amin(1)
    last = torch.where(moved, places, -1).amax(1)
    assert (last - first).max() == 3
    assert first.min() == 0
    assert last.max() == 7
