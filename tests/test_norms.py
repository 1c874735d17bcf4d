"""Lengths of vectors and the share of popularity, against slow definitions."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recclr.norms import head_share, norm_report, norms_of, pearson, spearman

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


def test_five_points_of_lengths():
    vectors = torch.tensor([[3.0, 4], [0, 0], [0, 1], [2, 0], [0, -7]])
    found = norms_of(vectors)
    assert (found.minimum, found.lower_quartile, found.median) == (0, 1, 2)
    assert (found.upper_quartile, found.maximum) == (5, 7)
    between = norms_of(torch.tensor([[1.0], [2], [4], [8]]))
    assert (between.lower_quartile, between.median, between.upper_quartile) == (1.75, 3, 5)
    assert math.isnan(norms_of(torch.empty(0, 3)).median)


def test_the_head_is_so_many_of_the_items():
    counts = torch.arange(700)
    ranked = torch.tensor([[699, 693, -1], [692, 0, 1], [698, 5, 695]])
    # Seven items: 693 to 699.
    assert head_share(ranked, counts) == pytest.approx(4 / 8)
    assert head_share(ranked, counts, share=0.0101) == pytest.approx(5 / 8)
    assert head_share(ranked, counts[:9].repeat(78)[:700], share=1.0) == 1.0
    assert math.isnan(head_share(torch.full((2, 3), -1), counts))
    # Ties by index.
    assert head_share(torch.tensor([[0]]), torch.ones(50), share=0.02) == 1.0
    assert head_share(torch.tensor([[1]]), torch.ones(50), share=0.02) == 0.0


def test_a_report_of_items_that_are_longer_the_more_popular_they_are():
    counts = torch.tensor([1, 3, 7, 15, 31])
    lengths = (counts + 1).double().log().float()
    items = torch.nn.functional.one_hot(torch.arange(5) % 2, 2) * lengths[:, None]
    users = torch.tensor([[1.0, 0], [0, 2]])
    found = norm_report(users, items, counts, torch.tensor([[4, 3], [4, 2]]))
    assert (found.users.minimum, found.users.maximum) == (1, 2)
    assert found.items.maximum == pytest.approx(math.log(32))
    assert found.pearson == pytest.approx(1.0)
    assert found.spearman == pytest.approx(1.0)
    assert found.head_share == pytest.approx(0.5)
    unit = torch.nn.functional.normalize(torch.randn(5, 3, generator=torch.Generator()))
    flat = norm_report(users, unit, counts, torch.tensor([[0]]))
    assert math.isnan(flat.pearson)
    assert math.isnan(flat.spearman)
    assert flat.head_share == 0.0
