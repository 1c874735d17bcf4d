from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from recclr.data.log import Csr
from recclr.export.lance_search import nearest
from recclr.export.manifest import Manifest

EPS = torch.finfo(torch.float32).eps


class Engine:
    """Ranks by 1 - dot plus the error that an engine may make, and forgets its scores."""

    def __init__(self, items, error, seed=0):
        self.items, self.error = items, error
        self.random = np.random.default_rng(seed)
        self.fetched = []

    def fetch(self, queries, count):
        self.fetched.append((len(queries), count))
        exact = queries.double().numpy() @ self.items.double().numpy().T
        noise = self.random.choice([-1.0, 1.0], exact.shape) * self.error
        order = np.argsort(1 - exact + noise, axis=1)[:, :count]
        rows = torch.from_numpy(order.reshape(-1).copy())
        query_rows = torch.arange(len(queries)).repeat_interleave(order.shape[1])
        shuffled = torch.from_numpy(self.random.permutation(len(rows)))
        query_rows, rows = query_rows[shuffled], rows[shuffled]
        return query_rows, rows, self.items[rows]


def manifest_of(items):
    lengths = torch.linalg.vector_norm(items, dim=1, dtype=torch.float64)
    facts = SimpleNamespace(
        num_items=len(items), embedding_dim=items.shape[1], max_item_norm=float(lengths.max())
    )
    facts.score_tolerance = lambda queries: Manifest.score_tolerance(facts, queries)
    return facts


def slow(items, query, k, seen):
    scores = [
        float(np.float32(np.dot(query.double().numpy(), item.double().numpy()))) for item in items
    ]
    left = [row for row in range(len(items)) if row not in seen]
    return sorted(left, key=lambda row: (-scores[row], row))[:k], scores


def check(items, queries, k, seen, error):
    engine = Engine(items, error)
    pairs = [(query, row) for query, rows in enumerate(seen) for row in rows]
    csr = Csr.from_pairs(
        torch.tensor([query for query, _ in pairs], dtype=torch.int64),
        torch.tensor([row for _, row in pairs], dtype=torch.int64),
        len(queries),
    )
    found = nearest(engine.fetch, manifest_of(items), queries, k, csr)
    for number, query in enumerate(queries):
        expected, scores = slow(items, query, k, set(seen[number]))
        padding = k - len(expected)
        assert found.item_idx[number].tolist() == expected + [-1] * padding
        values = [scores[row] for row in expected] + [-np.inf] * padding
        assert found.scores[number].tolist() == values
    return engine


@given(st.data())
def test_it_is_exact_whatever_the_engine_errs_within_its_bound(data):
    num_items = data.draw(st.integers(1, 90))
    num_queries = data.draw(st.integers(1, 5))
    k = data.draw(st.integers(1, num_items + 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    size = data.draw(st.sampled_from([1e-7, 1e-3, 1.0, 30.0]))
    items = torch.randn(num_items, 3, generator=generator) * size
    # Repeated items, so that ties cross every cut-off.
    items[num_items // 2 :] = items[: num_items - num_items // 2].clone()
    queries = torch.randn(num_queries, 3, generator=generator)
    rows = st.lists(st.integers(0, num_items - 1), max_size=num_items)
    seen = [data.draw(rows) for _ in range(num_queries)]
    scale = float(manifest_of(items).score_tolerance(queries).max())
    check(items, queries, k, seen, error=scale + EPS)


def test_clear_cases_need_one_look_and_close_ones_more():
    far = torch.arange(1.0, 401.0)[:, None]
    engine = check(far, torch.ones(2, 1), 3, [[], []], error=0.0)
    assert engine.fetched == [(2, 3 + 16)]
    close = torch.ones(400, 1)
    close[7] = 1 + 2 * EPS
    engine = check(close, torch.ones(1, 1), 3, [[]], error=2 * EPS)
    assert [count for _, count in engine.fetched] == [19, 76, 304, 400]


def test_only_the_queries_that_are_close_are_asked_again():
    items = torch.stack([torch.arange(1.0, 201.0), torch.ones(200)], 1)
    engine = check(items, torch.eye(2), 3, [[], []], error=0.0)
    assert engine.fetched[0] == (2, 19)
    assert {queries for queries, _ in engine.fetched[1:]} == {1}


def test_as_many_more_are_fetched_as_the_longest_list_of_seen_items():
    items = torch.arange(1.0, 1001.0)[:, None]
    seen = [[], list(range(990, 1000)), list(range(500, 1000)), []]
    engine = check(items, torch.ones(4, 1), 2, seen, error=0.0)
    assert engine.fetched == [(4, 2 + 500 + 16)]


def test_batches_are_cut_to_the_budget_with_the_long_lists_together(monkeypatch):
    monkeypatch.setattr("recclr.export.lance_search._BUDGET", 1100)
    items = torch.arange(1.0, 1001.0)[:, None]
    long = list(range(500, 1000))
    engine = check(items, torch.ones(5, 1), 2, [[], long, [], long, []], error=0.0)
    assert sorted(engine.fetched) == [(1, 518), (2, 518), (2, 518)]


def test_no_queries():
    found = nearest(None, manifest_of(torch.ones(3, 2)), torch.empty(0, 2), 4, None)
    assert found.item_idx.shape == (0, 4)
    assert found.scores.shape == (0, 4)
