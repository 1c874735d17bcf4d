"""Factorisations: each against the equations that define it."""

import numpy as np
import pytest
import torch

from recclr.baselines.factors import als, bpr, spectral


def dense(log, weights=None):
    matrix = np.zeros((log.num_users, log.num_items))
    for row in range(len(log)):
        user, item = int(log.user_idx[row]), int(log.item_idx[row])
        matrix[user, item] = 1 if weights is None else matrix[user, item] + float(weights[row])
    return matrix


ALS = {"dim": 3, "regularization": 0.7, "alpha": 4.0}


def als_objective(ranker, had, confidence):
    users, items = ranker.user_vectors[:-1].numpy(), ranker.item_vectors.numpy()
    errors = confidence * (had - users @ items.T) ** 2
    return errors.sum() + ALS["regularization"] * ((users**2).sum() + (items**2).sum())


@pytest.mark.parametrize("with_weights", [True, False])
def test_als_items_solve_the_weighted_least_squares_of_the_users(random_prepared, with_weights):
    prepared = random_prepared(1, with_weights=with_weights)
    log = prepared.train
    had = dense(log)
    confidence = 1 + ALS["alpha"] * dense(log, log.weight)
    ranker = als(prepared, iterations=6, seed=2, **ALS)
    users, items = ranker.user_vectors[:-1].numpy(), ranker.item_vectors.numpy()
    for item in range(log.num_items):
        weighted = users * confidence[:, item, None]
        gram = weighted.T @ users + ALS["regularization"] * np.eye(3)
        expected = np.linalg.solve(gram, weighted.T @ had[:, item])
        assert np.allclose(items[item], expected, atol=1e-4)
    assert np.abs(items).max() > 0.1


def test_als_iterations_lower_the_objective(random_prepared):
    prepared = random_prepared(2, with_weights=True)
    log = prepared.train
    had, confidence = dense(log), 1 + ALS["alpha"] * dense(log, log.weight)
    values = [
        als_objective(als(prepared, iterations=count, seed=2, **ALS), had, confidence)
        for count in (1, 2, 5, 20)
    ]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.9 * values[0]
    # Zero vectors, the answer of a model that learned nothing.
    assert values[-1] < 0.9 * (confidence * had).sum()


def test_bpr_ranks_what_the_user_had_above_the_rest(random_prepared):
    prepared = random_prepared(3)
    had = dense(prepared.train)[:12]
    settings = {"dim": 4, "learning_rate": 0.1, "regularization": 0.001, "seed": 1}

    def pairs_in_order(iterations):
        ranker = bpr(prepared, iterations=iterations, **settings)
        scores = (ranker.user_vectors @ ranker.item_vectors.T).numpy()
        right = [
            scores[user, mine] > scores[user, other]
            for user in range(12)
            for mine in np.flatnonzero(had[user])
            for other in np.flatnonzero(had[user] == 0)
        ]
        return np.mean(right)

    assert pairs_in_order(300) > 0.95
    assert pairs_in_order(300) > pairs_in_order(1)


@pytest.mark.parametrize("item_power", [0.2, 0.5])
@pytest.mark.parametrize("dim", [2, 5])
def test_spectral_scores_equal_those_of_a_full_svd(random_prepared, item_power, dim):
    prepared = random_prepared(6)
    had = dense(prepared.train)
    by_user, by_item = (np.maximum(had.sum(axis), 1) for axis in (1, 0))
    normalised = had / np.sqrt(by_user[:, None]) / np.sqrt(by_item)
    _, values, right = np.linalg.svd(normalised)
    # The subspace is only defined where the values beside its edge differ.
    assert values[dim - 1] - values[dim] > 0.01
    basis = right[:dim].T
    users = had @ (basis / np.sqrt(by_item)[:, None])
    items = basis * by_item[:, None] ** item_power
    ranker = spectral(prepared, dim=dim, item_power=item_power, seed=1)
    assert ranker.user_vectors.shape == (14, dim)
    found = (ranker.user_vectors @ ranker.item_vectors.T).numpy()
    assert np.allclose(found[:13], users @ items.T, atol=1e-5)
    assert np.abs(users @ items.T).max() > 0.1


def test_spectral_with_all_dimensions_gives_back_the_matrix(random_prepared):
    prepared = random_prepared(5)
    had = dense(prepared.train)
    by_item = np.maximum(had.sum(0), 1)
    ranker = spectral(prepared, dim=99, item_power=0.2, seed=1)
    assert ranker.item_vectors.shape == (11, 11)
    found = (ranker.user_vectors @ ranker.item_vectors.T).numpy()
    # V Vᵀ is the identity, so user u scores item j by deg_j^-½ · deg_j^p where they had it.
    assert np.allclose(found[:13], had * by_item**-0.3, atol=1e-5)


def test_values_of_repeated_rows_count_for_als_alone(random_prepared, prepared_of):
    once = prepared_of([(0, 0), (1, 1), (2, 2), (3, 0), (3, 1)], 4, 3, weights=[2.0, 1, 1, 1, 1])
    twice = prepared_of(
        [(0, 0), (0, 0), (1, 1), (2, 2), (3, 0), (3, 1)], 4, 3, weights=[1.0, 1, 1, 1, 1, 1]
    )
    vectors = [als(p, iterations=4, seed=1, **ALS).item_vectors for p in (once, twice)]
    assert torch.equal(*vectors)
    plain = prepared_of([(0, 0), (1, 1), (2, 2), (3, 0), (3, 1)], 4, 3)
    assert not torch.allclose(
        als(plain, iterations=4, seed=1, **ALS).item_vectors, vectors[0], atol=1e-3
    )
