"""The log as matrices, entry by entry."""

import numpy as np
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.baselines.matrices import interactions, largest_per_row, row_numbers
from recclr.data.log import EncodedLog

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=20)


def log_of(pairs):
    columns = torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)
    return EncodedLog(columns[:, 0], columns[:, 1], 4, 6)


@given(PAIRS)
@settings(deadline=None)
def test_without_values_a_pair_counts_once(pairs):
    expected = np.zeros((4, 6))
    for user, item in pairs:
        expected[user, item] = 1
    assert np.array_equal(interactions(log_of(pairs)).toarray(), expected)


@given(PAIRS)
@settings(deadline=None)
def test_values_of_repeated_pairs_add_up(pairs):
    values = [0.5 + place for place in range(len(pairs))]
    expected = np.zeros((4, 6))
    for (user, item), value in zip(pairs, values, strict=True):
        expected[user, item] += value
    found = interactions(log_of(pairs), torch.tensor(values, dtype=torch.float64))
    assert np.allclose(found.toarray(), expected)


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=5),
    st.integers(1, 7),
)
@settings(deadline=None)
def test_the_largest_of_each_row_are_kept_the_first_among_equals(rows, count):
    dense = np.array(rows, dtype=np.float32)
    expected = np.zeros_like(dense)
    for row, values in enumerate(dense):
        kept = [c for c in np.argsort(-values, kind="stable") if values[c] > 0][:count]
        expected[row, kept] = values[kept]
    found = largest_per_row(sp.csr_matrix(dense), count)
    assert np.array_equal(found.toarray(), expected)
    assert found.shape == dense.shape
    assert row_numbers(found).tolist() == found.nonzero()[0].tolist()
