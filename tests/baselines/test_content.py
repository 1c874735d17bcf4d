"""Content similarity against TF-IDF by loops."""

import math
from itertools import chain

import numpy as np
import pytest
import torch

from recclr.baselines.content import content, item_vectors
from recclr.data.log import CategoricalColumn, Csr, DenseColumn, RaggedColumn

# Item by item; 0 is no category, None no value.
KIND = [1, 2, 1, 0, 2, 1, 0, 1, 2, 2, 0]
WORDS = [[1, 3], [3], [1, 4, 6], [], [6, 3, 3], [4], [], [5], [1, 5], [3, 4], [2]]
YEAR = [0.5, -1.0, 2.0, None, 0.5, 0.5, None, -0.3, 0.0, 1.0, None]
VECTOR = [[1, 2], [0, 1], [3, 0], None, [1, 1], [2, 4], None, [-1, 0], None, [1, 0], [0, 2]]


def flagged(rows, width):
    present = [
        [*map(float, row), 0.0] if row is not None else [0.0] * width + [1.0] for row in rows
    ]
    return DenseColumn(torch.tensor(present, dtype=torch.float16))


@pytest.fixture
def columns():
    rows = torch.tensor([row for row, words in enumerate(WORDS) for _ in words])
    values = torch.tensor([word for words in WORDS for word in words])
    return {
        "kind": CategoricalColumn(torch.tensor(KIND, dtype=torch.int32), 3),
        "words": RaggedColumn(Csr.from_pairs(rows, values, len(WORDS)), 7),
        "year": flagged([None if year is None else [year] for year in YEAR], 1),
        "vector": flagged(VECTOR, 2),
    }


def unit(row):
    length = math.sqrt(sum(value * value for value in row))
    return [value / length if length else 0.0 for value in row]


def counted(lists, cardinality):
    """TF-IDF rows of unit length; 0 is no category."""
    rows = []
    for words in lists:
        row = [0.0] * cardinality
        for word in words:
            num_items = sum(word in other for other in lists)
            if word:
                row[word] += math.log((1 + len(lists)) / (1 + num_items))
        rows.append(unit(row))
    return rows


def vectors_slowly():
    features = [
        counted([[kind] for kind in KIND], 3),
        counted(WORDS, 7),
        [[0.0, 0.0] if year is None else unit([1.0, year]) for year in YEAR],
        [[0.0, 0.0] if vector is None else unit(vector) for vector in VECTOR],
    ]
    return np.array([unit([*chain(*parts)]) for parts in zip(*features, strict=True)])


def test_items_equal_tf_idf_by_loops(random_prepared, columns):
    found = item_vectors(random_prepared(1, columns=columns)).toarray()
    assert found.dtype == np.float32
    # Two features in float16: their values are good to three digits.
    assert np.allclose(found @ found.T, vectors_slowly() @ vectors_slowly().T, atol=2e-3)


def test_items_without_any_feature_are_like_nothing(random_prepared, columns):
    found = item_vectors(random_prepared(1, columns=columns)).toarray()
    # Both lack a kind, words, a year and a vector; that makes them no pair.
    assert not found[[3, 6]].any()
    assert np.allclose(np.linalg.norm(np.delete(found, [3, 6], 0), axis=1), 1, atol=1e-5)


def test_close_numbers_are_more_alike_than_distant_ones(random_prepared):
    years = {"year": flagged([[0.1 * place] for place in range(11)], 1)}
    found = item_vectors(random_prepared(1, columns=years)).toarray()
    alike = found[0] @ found.T
    assert bool((np.diff(alike) < 0).all())


@pytest.mark.parametrize("half_life_d", [None, 8.0])
def test_users_are_scored_by_the_cosine_to_their_mean(random_prepared, columns, half_life_d):
    prepared = random_prepared(2, columns=columns)
    log, vectors = prepared.train, vectors_slowly()
    weight = np.zeros((13, 11))
    for row in range(len(log)):
        user, item = int(log.user_idx[row]), int(log.item_idx[row])
        if half_life_d is None:
            weight[user, item] = 1
        else:
            age_d = (prepared.cutoff - int(log.timestamp[row])) / 86_400
            weight[user, item] += 0.5 ** (age_d / half_life_d)
    expected = np.array([unit(row) for row in weight @ vectors]) @ vectors.T
    found = content(prepared, half_life_d=half_life_d).score(torch.arange(13)).numpy()
    assert np.allclose(found, expected, atol=3e-3)


def test_cold_items_are_found_by_their_features(prepared_of):
    kind = CategoricalColumn(torch.tensor([1, 2, 3, 3, 2, 1], dtype=torch.int32), 4)
    prepared = prepared_of([(0, 0), (1, 1), (2, 2)], 3, 6, columns={"kind": kind})
    ranker = content(prepared)
    found = ranker.top_k(torch.arange(3), 1, items=torch.tensor([3, 4, 5]))
    assert found.item_idx.squeeze(1).tolist() == [5, 4, 3]
