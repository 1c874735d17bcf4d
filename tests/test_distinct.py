"""Distinct values and counts at a fixed shape, against torch's own of any shape."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.distinct import counted, padded_distinct

values = st.lists(st.integers(-5, 7), min_size=1, max_size=30).map(torch.tensor)


@given(given_=values, most=st.integers(13, 40))
@settings(max_examples=150, deadline=None)
def test_distinct_values_then_the_last_again(given_, most):
    found = padded_distinct(given_, most)
    size = min(len(given_), most)
    expected, inverse, counts = torch.unique(given_, return_inverse=True, return_counts=True)
    num = len(expected)
    assert torch.equal(found.values[:num], expected)
    assert (found.values[num:] == expected[-1]).all()
    assert torch.equal(found.places, torch.arange(size).clamp(max=num - 1))
    assert torch.equal(found.inverse(), inverse)
    assert torch.equal(given_[found.order], given_.sort(stable=True).values)
    assert torch.equal(found.order, given_.sort(stable=True).indices)
    starts = counts.cumsum(0) - counts
    assert found.starts().tolist() == starts.tolist() + [len(given_)] * (size - num)


@given(size=st.integers(1, 9), data=st.data())
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_bincount(size, data):
    places = torch.tensor(
        data.draw(st.lists(st.integers(0, size - 1), max_size=20)), dtype=torch.int64
    )
    found = counted(places, size)
    assert found.dtype == torch.float32
    assert found.tolist() == torch.bincount(places, minlength=size).tolist()
