"""Exact top-k against a stable sort of the full score matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recclr.topk as topk_module
from recclr.data.log import Csr
from recclr.errors import DivergedError, ShapeError
from recclr.topk import EmbeddingRanker, top_k, top_k_of_scores

pytestmark = pytest.mark.usefixtures("both_kernels")


def by_stable_sort(scores, k, seen=None, items=None):
    """Slow twin: mask, then sort each row by (score descending, item ascending)."""
    scores = scores.numpy().copy()
    if seen is not None:
        for row in range(seen.num_rows):
            scores[row, seen.row(row).numpy()] = -np.inf
    if items is not None:
        outside = np.setdiff1d(np.arange(scores.shape[1]), items.numpy())
        scores[:, outside] = -np.inf
    idx = np.full((len(scores), k), -1)
    for row, values in enumerate(scores):
        order = np.argsort(-values, kind="stable")[:k]
        order = order[values[order] > -np.inf]
        idx[row, : len(order)] = order
    return idx


def random_seen(num_rows, num_items, generator):
    lengths = torch.randint(0, 1 + num_items // 2, (num_rows,), generator=generator)
    rows = torch.arange(num_rows).repeat_interleave(lengths)
    values = torch.randint(0, num_items, (len(rows),), generator=generator)
    return Csr.from_pairs(rows, values, num_rows)


@given(
    seed=st.integers(0, 10_000),
    num_queries=st.integers(0, 9),
    num_items=st.integers(1, 400),
    k=st.integers(1, 30),
    levels=st.integers(1, 50),
    with_seen=st.booleans(),
    with_items=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_equals_a_stable_sort_even_with_many_ties(
    seed, num_queries, num_items, k, levels, with_seen, with_items
):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (num_queries, num_items), generator=generator).float()
    seen = random_seen(num_queries, num_items, generator) if with_seen else None
    items = None
    if with_items:
        items = (torch.rand(num_items, generator=generator) < 0.5).nonzero().squeeze(1)
    before = scores.clone()
    found = top_k_of_scores(scores, k, seen=seen, items=items)
    assert torch.equal(scores, before)
    assert found.item_idx.tolist() == by_stable_sort(scores, k, seen, items).tolist()


@pytest.mark.parametrize("columns", [7, 64, 4096])
def test_tiles_of_any_width_give_the_same_ranking(columns, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    # Whole numbers: products are exact, so ties are real ties whatever the tiling.
    queries = torch.randint(-3, 4, (37, 5), generator=generator).float()
    corpus = torch.randint(-3, 4, (1501, 5), generator=generator).float()
    seen = random_seen(37, 1501, generator)
    expected = by_stable_sort(queries @ corpus.T, 13, seen)
    monkeypatch.setattr(topk_module, "_MAX_COLUMNS", columns)
    monkeypatch.setitem(topk_module._TILE_ELEMENTS, "cpu", 10 * columns)
    found = top_k(queries, corpus, 13, seen=seen)
    assert found.item_idx.tolist() == expected.tolist()
    best = (queries @ corpus.T).gather(1, found.item_idx)
    assert torch.equal(best, found.scores)


def test_item_subset_is_ranked_alone_and_in_item_numbers():
    queries, corpus = torch.eye(3), torch.arange(33.0).view(11, 3)
    items = torch.tensor([2, 5, 9])
    found = top_k(queries, corpus, 5, items=items)
    assert found.item_idx.tolist() == [[9, 5, 2, -1, -1]] * 3
    assert found.scores[0].tolist() == [27.0, 15.0, 6.0, -np.inf, -np.inf]


def test_no_query_and_no_candidate():
    assert top_k(torch.empty(0, 4), torch.ones(6, 4), 3).item_idx.shape == (0, 3)
    nothing = top_k(torch.ones(2, 4), torch.ones(6, 4), 3, items=torch.empty(0, dtype=torch.int64))
    assert nothing.item_idx.tolist() == [[-1] * 3] * 2


def test_all_items_seen_leaves_nothing():
    seen = Csr(torch.tensor([0, 4]), torch.arange(4, dtype=torch.int32))
    assert top_k(torch.ones(1, 2), torch.ones(4, 2), 2, seen=seen).item_idx.tolist() == [[-1, -1]]


def test_nan_is_refused_wherever_it_stands():
    corpus = torch.ones(2000, 3)
    corpus[1234, 1] = torch.nan
    with pytest.raises(DivergedError, match="NaN"):
        top_k(torch.ones(2, 3), corpus, 5)


def test_unknown_users_get_the_last_vector():
    ranker = EmbeddingRanker("x", torch.tensor([[1.0, 0], [1, 0], [-1, 0]]), torch.eye(2))
    users = torch.tensor([0, 1, 2, 3, 4, 77])
    assert ranker.top_k(users, 1).item_idx.squeeze(1).tolist() == [0, 0, 1, 1, 1, 1]


def test_wrong_shapes_are_named():
    with pytest.raises(ShapeError, match="rows of seen"):
        top_k(torch.ones(2, 3), torch.ones(4, 3), 1, seen=Csr(torch.tensor([0]), torch.tensor([])))
    with pytest.raises(ShapeError, match="queries"):
        top_k(torch.ones(2, 3), torch.ones(4, 2), 1)


@pytest.mark.parametrize("columns", [9, 64, 4096])
def test_a_subset_less_what_was_seen_is_ranked_in_tiles_too(columns, monkeypatch):
    generator = torch.Generator().manual_seed(6)
    queries = torch.randint(-3, 4, (29, 4), generator=generator).float()
    corpus = torch.randint(-3, 4, (1203, 4), generator=generator).float()
    seen = random_seen(29, 1203, generator)
    items = (torch.rand(1203, generator=generator) < 0.4).nonzero().squeeze(1)
    expected = by_stable_sort(queries @ corpus.T, 17, seen, items)
    monkeypatch.setattr(topk_module, "_MAX_COLUMNS", columns)
    monkeypatch.setitem(topk_module._TILE_ELEMENTS, "cpu", 8 * columns)
    calls = []
    found = top_k(
        queries, corpus, 17, seen=seen, items=items, progress=lambda *call: calls.append(call)
    )
    assert found.item_idx.tolist() == expected.tolist()
    done = [number for number, _ in calls]
    assert done == sorted(set(done))
    assert calls[-1] == (29, 29)
    ranker = EmbeddingRanker("x", queries, corpus).top_k(
        torch.arange(29), 17, seen=seen, items=items
    )
    assert torch.equal(ranker.item_idx, found.item_idx)


@pytest.mark.parametrize("with_items", [False, True])
@pytest.mark.parametrize("smallest", [1, 1 << 30])
def test_a_corpus_in_a_file_is_ranked_stretch_by_stretch(
    with_items, smallest, monkeypatch, tmp_path
):
    generator = torch.Generator().manual_seed(12)
    queries = torch.randint(-3, 4, (31, 5), generator=generator).float()
    corpus = torch.randint(-3, 4, (1409, 5), generator=generator).float()
    seen = random_seen(31, 1409, generator)
    items = (torch.rand(1409, generator=generator) < 0.6).nonzero().squeeze(1)
    items = items if with_items else None
    expected = by_stable_sort(queries @ corpus.T, 7, seen, items)
    (tmp_path / "corpus").write_bytes(corpus.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "corpus"), size=1409 * 5).view(1409, 5)
    # Stretches of 300 items; by way of bfloat16 scores where the processor has them, and without.
    monkeypatch.setitem(topk_module._HELD_ELEMENTS, "cpu", 1500)
    monkeypatch.setattr(topk_module, "smallest_corpus", lambda k: max(smallest, 32 * k))
    calls = []
    found = top_k(
        queries, mapped, 7, seen=seen, items=items, progress=lambda *call: calls.append(call)
    )
    assert found.item_idx.tolist() == expected.tolist()
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (31, 31)


def test_vectors_of_different_width_are_refused():
    with pytest.raises(ShapeError, match="one dimension"):
        EmbeddingRanker("x", torch.ones(3, 4), torch.ones(5, 2))


@pytest.mark.parametrize("call", [top_k, lambda *args: top_k_of_scores(torch.ones(2, 4), 0)])
def test_k_below_1_is_refused(call):
    with pytest.raises(ShapeError, match="k "):
        call(torch.ones(2, 3), torch.ones(4, 3), 0)


@pytest.mark.parametrize("columns", [3, 5, 4096])
@pytest.mark.parametrize("left", [[0, 1, 2], [3, 9], [10]])
def test_tiles_in_which_everything_was_seen_leave_no_trace(columns, left, monkeypatch):
    monkeypatch.setattr(topk_module, "_MAX_COLUMNS", columns)
    seen = torch.tensor([item for item in range(11) if item not in left])
    found = top_k(
        torch.ones(1, 1),
        torch.arange(11.0)[:, None],
        4,
        seen=Csr(torch.tensor([0, len(seen)]), seen.int()),
    )
    missing = 4 - len(left)
    assert found.item_idx.tolist() == [left[::-1] + [-1] * missing]
    assert found.scores.tolist() == [[*map(float, left[::-1])] + [-np.inf] * missing]


def test_a_ranker_keeps_its_name_and_vectors_wherever_it_is():
    users, items = torch.randn(4, 5), torch.randn(7, 5)
    ranker = EmbeddingRanker("x", users, items, similarity="euclidean", num_beside=2)
    moved = ranker.to("meta")
    assert (moved.name, moved.similarity, moved.num_beside) == ("x", "euclidean", 2)
    assert moved.user_vectors.device.type == moved.item_vectors.device.type == "meta"
    assert moved.user_vectors.shape == users.shape
    same = ranker.to("cpu")
    assert same.user_vectors.data_ptr() == users.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("among", [None, [1, 4, 5, 80]])
def test_a_ranker_on_a_gpu_takes_queries_and_seen_items_from_the_cpu(among):
    draws = torch.Generator().manual_seed(3)
    ranker = EmbeddingRanker(
        "x", torch.randn(30, 8, generator=draws), torch.randn(90, 8, generator=draws)
    )
    user_idx, seen = torch.tensor([3, 0, 29, 77]), random_seen(4, 90, draws)
    items = None if among is None else torch.tensor(among)
    expected = ranker.top_k(user_idx, 3, seen=seen, items=items)
    found = ranker.to("cuda").top_k(user_idx, 3, seen=seen, items=items)
    assert torch.equal(found.item_idx.cpu(), expected.item_idx)
    torch.testing.assert_close(found.scores.cpu(), expected.scores)
