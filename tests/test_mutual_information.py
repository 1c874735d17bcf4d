"""What columns tell about each other, against scikit-learn's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

import recclr.mutual_information as module
from recclr.data.log import CategoricalColumn, Csr, DenseColumn, RaggedColumn
from recclr.mutual_information import column_codes, information, mutual_information

N = 500


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(values, missing=None):
    flag = torch.zeros(len(values)) if missing is None else missing.float()
    return DenseColumn(torch.stack([values * (1 - flag), flag], 1))


def bags(lists):
    lengths = torch.tensor([0, *(len(bag) for bag in lists)])
    return Csr(lengths.cumsum(0), torch.tensor([v for bag in lists for v in bag]).int())


@given(pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=60))
@settings(max_examples=80)
def test_information_is_that_of_scikit_learn(pairs):
    one, other = torch.tensor(pairs).unbind(1)
    expected = mutual_info_score(one, other)
    assert information(one, other) == pytest.approx(expected, abs=1e-9)
    assert information(other, one) == pytest.approx(expected, abs=1e-9)


def test_an_empty_table_tells_nothing():
    none = torch.zeros(0, dtype=torch.int64)
    assert information(none, none) == 0.0
    columns = [
        CategoricalColumn(none.int(), 3),
        numbers(torch.zeros(0)),
        RaggedColumn(Csr(torch.zeros(1, dtype=torch.int64), none.int()), 3),
        DenseColumn(torch.zeros(0, 9)),
    ]
    assert torch.equal(mutual_information(columns), torch.zeros(4, 4, dtype=torch.float64))


def test_few_categories_are_themselves_and_many_are_hashed_alike():
    few = torch.randint(256, (N,), generator=draws()).int()
    assert torch.equal(column_codes(CategoricalColumn(few, 256)), few.long())
    many = torch.randint(90_000, (N,), generator=draws()).int()
    codes = column_codes(
        CategoricalColumn(torch.cat([many, many, torch.tensor([0]).int()]), 90_000)
    )
    assert torch.equal(codes[:N], codes[N : 2 * N])
    assert codes[-1] == 0
    assert codes[:-1].min() >= 1
    assert len(codes[:-1].unique()) > 150
    assert codes.max() < 257


def test_a_list_counts_as_a_set_and_none_is_missing():
    lists = [[1, 2, 3], [3, 1, 2], [1, 2], [], [2, 1], [5]]
    codes = column_codes(RaggedColumn(bags(lists), 9)).tolist()
    assert codes[0] == codes[1] != codes[2] == codes[4] != codes[5]
    assert codes[3] == 0
    assert 0 not in (codes[0], codes[2], codes[5])


def test_numbers_go_to_bins_of_equal_counts_and_equal_ones_to_one():
    values = torch.randperm(320, generator=draws()).float()
    missing = torch.arange(400) >= 320
    column = numbers(torch.cat([values, torch.zeros(80)]), missing)
    codes = column_codes(column)
    assert torch.equal(codes[:320], 1 + (values / 20).long())
    assert (codes[320:] == 0).all()
    constant = column_codes(numbers(torch.zeros(9)))
    assert len(constant.unique()) == 1
    tied = column_codes(numbers(torch.arange(3.0).repeat(50)))
    assert torch.equal(tied[:3].repeat(50), tied)
    assert len(tied.unique()) == 3
    lone = column_codes(DenseColumn(values[:, None]))
    assert torch.equal(lone, (values / 20).long())


def test_a_vector_tells_of_what_it_was_made_of():
    cluster = torch.randint(3, (N,), generator=draws(1))
    centres = 5 * torch.randn(3, 20, generator=draws(2))
    vectors = centres[cluster] + 0.1 * torch.randn(N, 20, generator=draws(3))
    flag = torch.zeros(N, 1)
    flag[:7] = 1
    values = torch.cat([vectors * (1 - flag), flag], 1).half()
    codes = column_codes(DenseColumn(values))
    assert (codes[:7] == 0).all()
    assert codes.max() <= 256
    found = mutual_information([DenseColumn(values[7:]), CategoricalColumn(cluster[7:].int(), 3)])
    assert found[0, 1] == pytest.approx(float(found[1, 1]), rel=0.05)


def test_all_pairs_of_a_table_at_once_and_nothing_of_what_is_no_column():
    one = torch.randint(4, (N,), generator=draws(4))
    noisy = torch.where(torch.rand(N, generator=draws(5)) < 0.3, 0, one)
    columns = [
        CategoricalColumn(one.int(), 4),
        None,
        numbers(noisy.float()),
        RaggedColumn(bags([[int(v)] * (v > 0) for v in one]), 4),
    ]
    found = mutual_information(columns)
    assert torch.equal(found, found.T)
    assert (found[1] == 0).all()
    assert found[0, 2] == pytest.approx(mutual_info_score(one, noisy))
    entropy = mutual_info_score(one, one)
    for place in ((0, 0), (0, 3), (3, 3)):
        assert found[place] == pytest.approx(entropy)
    # Of what is independent, the bias of the estimate.
    shuffled = one[torch.randperm(N, generator=draws(6))].int()
    chance = mutual_information([columns[0], CategoricalColumn(shuffled, 4)])
    assert 0 <= chance[0, 1] < 20 * 9 / (2 * N) < math.log(4)


def test_of_a_long_table_rows_are_taken_evenly(monkeypatch):
    monkeypatch.setattr(module, "_MAX_ROWS", 4)
    column = CategoricalColumn(torch.arange(10).int(), 20)
    assert column_codes(column).tolist() == [0, 2, 5, 7]
    assert column_codes(RaggedColumn(bags([[v] for v in range(10)]), 20)).shape == (4,)
    assert column_codes(numbers(torch.arange(10.0))).shape == (4,)
