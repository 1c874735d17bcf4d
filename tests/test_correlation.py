"""Correlations and quantiles against slow definitions."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recclr.correlation import pearson, points_of, spearman

PAIRS = st.lists(
    st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=2, max_size=40
).filter(lambda pairs: len({x for x, _ in pairs}) > 1 < len({y for _, y in pairs}))


def slow_ranks(values):
    ordered = sorted(values)
    return [
        statistics.mean(place + 1 for place, other in enumerate(ordered) if other == value)
        for value in values
    ]


@given(PAIRS)
def test_correlations_are_those_of_the_standard_library(pairs):
    x, y = ([float(value) for value in column] for column in zip(*pairs, strict=True))
    tensors = torch.tensor(x), torch.tensor(y)
    assert pearson(*tensors) == pytest.approx(statistics.correlation(x, y), abs=1e-9)
    ranked = statistics.correlation(slow_ranks(x), slow_ranks(y))
    assert spearman(*tensors) == pytest.approx(ranked, abs=1e-9)


def test_what_does_not_vary_correlates_with_nothing():
    assert math.isnan(pearson(torch.full((5,), 0.1), torch.arange(5)))
    assert math.isnan(spearman(torch.arange(5), torch.ones(5)))
    assert math.isnan(pearson(torch.ones(1), torch.ones(1)))
    assert math.isnan(pearson(torch.empty(0), torch.empty(0)))


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    st.lists(st.floats(0, 1), max_size=5),
)
def test_points_are_the_quantiles_of_torch(values, shares):
    found = points_of(torch.tensor(values, dtype=torch.float64), shares)
    expected = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor(shares, dtype=torch.float64)
    )
    assert found == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-9)
