"""EASE against its closed form in float64, and against what the closed form minimises."""

import numpy as np
import pytest
import torch

from recclr.baselines.ease import ease


def dense(prepared):
    log = prepared.train
    matrix = np.zeros((log.num_users, log.num_items))
    matrix[log.user_idx.numpy(), log.item_idx.numpy()] = 1
    return matrix


@pytest.mark.parametrize("regularization", [0.5, 40.0])
def test_equals_the_closed_form_with_a_zero_diagonal(random_prepared, regularization):
    prepared = random_prepared(1)
    users = dense(prepared)
    inverse = np.linalg.inv(users.T @ users + regularization * np.eye(11))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    found = ease(prepared, regularization=regularization).score(torch.arange(13))
    assert found.dtype == torch.float32
    assert np.allclose(found.numpy(), users @ weights, atol=1e-5)


def test_equals_a_ridge_regression_of_each_item_on_the_others(random_prepared):
    prepared = random_prepared(2)
    users = dense(prepared)
    found = ease(prepared, regularization=3.0).score(torch.arange(13)).numpy()
    for item in range(11):
        others = np.delete(users, item, 1)
        gram = others.T @ others + 3.0 * np.eye(10)
        weights = np.linalg.solve(gram, others.T @ users[:, item])
        assert np.allclose(found[:, item], others @ weights, atol=1e-5)
